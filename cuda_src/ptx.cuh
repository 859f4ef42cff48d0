// All inline PTX, each instruction behind a small function with a name.
// PTX ISA: docs.nvidia.com/cuda/parallel-thread-execution.
// An executor that is not a GPU defines CUPLAMA_PTX_CUH and brings functions of the same names.
#ifndef CUPLAMA_PTX_CUH
#define CUPLAMA_PTX_CUH

// ---- copies from global to shared memory that the thread does not wait for (sm_80; plain copies before) ---------------

// 16 bytes, or 16 zero bytes if not `valid`; the global address is not read then. Both addresses on 16-byte boundaries.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
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

// ---- programmatic dependent launch (sm_90; nothing before) -----------------------------------------------------------
// The next kernel of the stream may start once every block of this one has called launch_dependents or ended, if it is
// launched so; it is if its own text calls wait_for_previous (cuplama/kernel.py). Until that call returns it must not
// touch what an earlier kernel reads or writes. Pointers to such memory are declared without __restrict__: with it the
// compiler takes the memory for constant and may move loads up past the wait.

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all earlier kernels of the stream have ended and their writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
