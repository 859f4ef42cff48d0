// All inline PTX, each instruction behind a small function with a name.
// PTX ISA: docs.nvidia.com/cuda/parallel-thread-execution.
// An executor that is not a GPU defines CUPLAMA_PTX_CUH and brings functions of the same names.
#ifndef CUPLAMA_PTX_CUH
#define CUPLAMA_PTX_CUH

// ---- bits -----------------------------------------------------------------------------------------------------------

// (x & mask) | bits in one instruction. Where both are constants the compiler makes two of it.
__device__ __forceinline__ unsigned and_or(unsigned x, unsigned mask, unsigned bits) {
    unsigned found;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(found) : "r"(x), "r"(mask), "r"(bits));
    return found;
}

// (~x & mask) | bits
__device__ __forceinline__ unsigned not_and_or(unsigned x, unsigned mask, unsigned bits) {
    unsigned found;
    asm("lop3.b32 %0, %1, %2, %3, 0xae;" : "=r"(found) : "r"(x), "r"(mask), "r"(bits));
    return found;
}

// Takes x for a value that only this place knows: the compiler keeps it in its register and does not compute it again.
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }

// The same number, of which the compiler then knows nothing.
__device__ __forceinline__ unsigned hidden(unsigned x) {
    asm("mov.b32 %0, %0;" : "+r"(x));
    return x;
}

// ---- copies from global to shared memory that the thread does not wait for (sm_80; plain copies before) -------------

// 16 bytes, or 16 zero bytes if not `valid`; the global address is not read then. Both addresses on 16-byte boundaries.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
        "l"(global), "r"(valid ? 16 : 0)
        : "memory");
#else
    *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// The same with 8 bytes, on 8-byte boundaries.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(valid ? 8 : 0)
                 : "memory");
#else
    *static_cast<uint2*>(shared) = valid ? *static_cast<const uint2*>(global) : make_uint2(0, 0);
#endif
}

// Closes a group of this thread's copies; it may be empty.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the newest N groups of this thread have arrived, for this thread to read.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- order in memory ------------------------------------------------------------------------------------------------

// What this thread wrote, and what others wrote before a barrier with it, is seen by those that see what it writes from
// here on; and the other way round. Cheaper than __threadfence, which keeps one order for all threads.
__device__ __forceinline__ void fence_gpu() {
#if __CUDA_ARCH__ >= 700
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
    __threadfence();
#endif
}

// A number that another block writes: what that one wrote before a fence, and before the number, is seen after this.
__device__ __forceinline__ unsigned ld_acquire(const unsigned* p) {
    unsigned found;
#if __CUDA_ARCH__ >= 700
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(p) : "memory");
#else
    found = *static_cast<const volatile unsigned*>(p);
    __threadfence();
#endif
    return found;
}

// ---- programmatic dependent launch (sm_90; nothing before) ----------------------------------------------------------
// The next kernel of the stream may start once every block of this one has called launch_dependents or ended, if it is
// launched so; it is if its own text calls pdl_wait (cuplama/ops/launch.py). Until that call returns it must not touch
// what an earlier kernel reads or writes. Pointers to such memory are declared without __restrict__: with it the
// compiler takes the memory for constant and may move loads up past the wait.

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all earlier kernels of the stream have ended and their writes are visible.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- matrices (sm_80); fragments as in the PTX ISA, "Matrix fragments for mma.m16n8k16" -----------------------------

// Four 8x8 matrices of 16-bit elements; lanes 8i .. 8i+7 bring the addresses of the rows (16 bytes each) of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
}

// d += a b with f32 sums; a is 16x16, b 16x8.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- 8-bit floats (sm_89); e4m3.cuh has what older GPUs do ----------------------------------------------------------

// Four e4m3 numbers as f16, the first in the lower half of `low`.
__device__ __forceinline__ void e4m3x4_to_f16(unsigned x, unsigned& low, unsigned& high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
        : "=r"(low), "=r"(high)
        : "r"(x));
}

// Two numbers rounded to e4m3 in 16 bits, the first in the lower half. What is too large becomes 448.
__device__ __forceinline__ unsigned e4m3x2_from_f32(float low, float high) {
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(both) : "f"(low), "f"(high));
    return both;
}

// ---- barriers in shared memory (sm_80 for arrivals, sm_90 for waiting), 8 bytes each --------------------------------

// A phase ends when `count` arrivals have come. One thread calls, before a block barrier.
__device__ __forceinline__ void mbarrier_init(void* bar, unsigned count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(unsigned(__cvta_generic_to_shared(bar))), "r"(count)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(void* bar) {
    asm volatile(
        "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(unsigned(__cvta_generic_to_shared(bar)))
        : "memory");
}

// Waits until the phase of that parity has ended: 0 for the first, 1 for the second, 0 for the third, ...
__device__ __forceinline__ void mbarrier_wait(void* bar, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    unsigned done = 0;
    while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(unsigned(__cvta_generic_to_shared(bar))), "r"(parity)
                     : "memory");
    }
#else
    __trap();
#endif
}

// An arrival, and the phase does not end before that many bytes more have come by bulk copies (sm_90).
__device__ __forceinline__ void mbarrier_arrive_expect_tx(void* bar, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(unsigned(__cvta_generic_to_shared(bar))),
                 "r"(bytes)
                 : "memory");
#else
    __trap();
#endif
}

// `bytes` (a multiple of 16) from a 16-byte boundary on come to the L2 (from sm_90 on; before, nothing happens).
__device__ __forceinline__ void prefetch_l2(const void* global, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes));
#endif
}

// One thread copies for all: `bytes` (a multiple of 16), both addresses on 16-byte boundaries; their arrival counts in
// the barrier (sm_90).
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes, void* bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     unsigned(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(bytes), "r"(unsigned(__cvta_generic_to_shared(bar)))
                 : "memory");
#else
    __trap();
#endif
}

// Barrier `id` (1 .. 15) among that many threads, whole warps.
__device__ __forceinline__ void bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- sums in global memory (sm_90; plain ones before) ----------------------------------------------------------------

// p[0 .. 3] += x, each number at once; on a 16-byte boundary.
__device__ __forceinline__ void red_add_4(float* p, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w)
                 : "memory");
#else
    p[0] += x, p[1] += y, p[2] += z, p[3] += w;
#endif
}

#include "ptx_wgmma.cuh"

#endif
