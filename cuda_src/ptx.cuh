// All inline PTX, each instruction behind a small function with a name.
// PTX ISA: docs.nvidia.com/cuda/parallel-thread-execution.
// An executor that is not a GPU defines CUPLAMA_PTX_CUH and brings functions of the same names.
#ifndef CUPLAMA_PTX_CUH
#define CUPLAMA_PTX_CUH

// 16 bytes that are read once and by nobody else, such as weights: they do not displace what L1 holds, and L2 fetches
// whole lines of 128 bytes. The memory must not change while the kernel runs. From sm_75 on.
__device__ __forceinline__ uint4 load_streamed(const void* p) {
    uint4 x;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
        : "l"(p));
    return x;
}

#endif
