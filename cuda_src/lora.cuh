// What the kernels of low-rank adapters share: where the columns of a part lie, and the sums of pieces.
#ifndef CUPLAMA_LORA_CUH
#define CUPLAMA_LORA_CUH

#include "common.cuh"

// How many of part[0 .. m-1], which does not decrease, are less than p: where part p begins. All lanes of a warp call
// it, and look at 32 places at once: three times for 30,000 columns.
__device__ __forceinline__ int part_begin(const i32* part, int m, int p) {
    int begin = 0, end = m;
    while (begin < end) {
        const int step = (end - begin + WARP - 1) / WARP, at = begin + int(threadIdx.x % WARP) * step;
        const int less = __popc(__ballot_sync(ALL_LANES, at < end && part[at] < p));
        if (less == 0) return begin;
        end = min(end, begin + less * step);  // the first place that is not less, or the end
        begin += (less - 1) * step + 1;       // behind the last that is
    }
    return begin;
}

// A share of begin .. end - 1: that of blockIdx.z of gridDim.z, cut at multiples of `step` from begin.
struct Range {
    int begin, end;

    __device__ __forceinline__ Range(int first, int last, int step) {
        const int share = ((last - first + step - 1) / step + gridDim.z - 1) / gridDim.z * step;
        begin = min(first + int(blockIdx.z) * share, last);
        end = min(begin + share, last);
    }
};

#endif
