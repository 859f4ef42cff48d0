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

// ---- warpgroup matrices (sm_90a alone); PTX ISA, "Asynchronous warpgroup level matrix instructions" -----------------
// Compiled for sm_90a only; a warpgroup is 4 warps, the first a multiple of 4, that call together.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// This thread's accesses to shared memory before are ordered before later ones of the asynchronous proxy (wgmma, bulk
// copies), its own and, behind a barrier, those of others.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of accumulators and of `a` are used from here on by the products that follow, until they are waited for.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N groups of products are on their way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// After a wait: keeps the compiler from reading sums before it.
template <int N>
__device__ __forceinline__ void wgmma_done(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// A matrix in shared memory in rows of 128 bytes, 8 rows to 1024 bytes on a 1024-byte boundary, the 16-byte vectors of
// row r exchanged by ^ (r % 8). next: bytes from one panel of 128-byte rows to the next (used where rows are along the
// sum).
__device__ __forceinline__ unsigned long long wgmma_matrix(const void* shared, unsigned next) {
    const unsigned long long at = (unsigned(__cvta_generic_to_shared(shared)) & 0x3ffff) >> 4;
    return at | (unsigned long long)(next >> 4) << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

// Registers of a warpgroup's threads; the block must have a known limit. N: a multiple of 8.
template <int N>
__device__ __forceinline__ void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// 8 and 32 operands of an asm statement.
#define CUPLAMA_8(d, i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define CUPLAMA_32(d, i) CUPLAMA_8(d, i), CUPLAMA_8(d, i + 8), CUPLAMA_8(d, i + 16), CUPLAMA_8(d, i + 24)

// d[64, 128] = a[64, 16] b[128, 16]^T, plus d if `add`; a and b in shared memory, rows across the sum.
__device__ __forceinline__ void wgmma_n128_f16(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
        "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0; }"
        : CUPLAMA_32(d, 0), CUPLAMA_32(d, 32)
        : "l"(a), "l"(b), "r"(int(add)));
}

__device__ __forceinline__ void wgmma_n128_bf16(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
        "%59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0; }"
        : CUPLAMA_32(d, 0), CUPLAMA_32(d, 32)
        : "l"(a), "l"(b), "r"(int(add)));
}

// d[64, N] += a[64, 16] b[16, N]; a in registers, as the A of mma.m16n8k16 per warp; b in shared memory, rows along the
// sum.
__device__ __forceinline__ void wgmma_f16(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
        : CUPLAMA_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
        : CUPLAMA_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_f16(float (&d)[48], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
        "%41, %42, %43, %44, %45, %46, %47}, {%48, %49, %50, %51}, %52, p, 1, 1, 1; }"
        : CUPLAMA_32(d, 0), CUPLAMA_8(d, 32), CUPLAMA_8(d, 40)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[48], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
        "%41, %42, %43, %44, %45, %46, %47}, {%48, %49, %50, %51}, %52, p, 1, 1, 1; }"
        : CUPLAMA_32(d, 0), CUPLAMA_8(d, 32), CUPLAMA_8(d, 40)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_f16(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
        "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
        : CUPLAMA_32(d, 0), CUPLAMA_32(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
        "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
        : CUPLAMA_32(d, 0), CUPLAMA_32(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d[64, N] = a[64, 16] b[N, 16]^T, plus d if `add`; a in registers, b in shared memory, rows across the sum.
__device__ __forceinline__ void wgmma_rows_f16(float (&d)[8], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %13, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, 0; }"
        : CUPLAMA_8(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma_rows_bf16(float (&d)[8], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %13, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, 0; }"
        : CUPLAMA_8(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma_rows_f16(float (&d)[16], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, "
        "1, 1, 0; }"
        : CUPLAMA_8(d, 0), CUPLAMA_8(d, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma_rows_bf16(float (&d)[16], const unsigned (&a)[4], unsigned long long b,
                                                bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, "
        "1, 1, 0; }"
        : CUPLAMA_8(d, 0), CUPLAMA_8(d, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma_rows_f16(float (&d)[24], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %29, 0; wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23}, {%24, %25, %26, %27}, %28, p, 1, 1, 0; }"
        : CUPLAMA_8(d, 0), CUPLAMA_8(d, 8), CUPLAMA_8(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma_rows_bf16(float (&d)[24], const unsigned (&a)[4], unsigned long long b,
                                                bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %29, 0; wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23}, {%24, %25, %26, %27}, %28, p, 1, 1, 0; }"
        : CUPLAMA_8(d, 0), CUPLAMA_8(d, 8), CUPLAMA_8(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma_rows_f16(float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
        : CUPLAMA_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
__device__ __forceinline__ void wgmma_rows_bf16(float (&d)[32], const unsigned (&a)[4], unsigned long long b,
                                                bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, "
        "%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
        : CUPLAMA_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}

#undef CUPLAMA_8
#undef CUPLAMA_32
#endif

#endif
