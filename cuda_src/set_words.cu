// set_words  words[places[i]] = values[i], where places[i] >= 0
//            words[n], places[k], values[k]: i32
//
// What changes in the inputs of a captured decode step when a sequence joins, leaves or gets a page: a few words, set
// behind the steps that are queued, so that nobody waits for them.
// Mapping: a thread for each word.
//
// Op and reference: cuplama/ops/set_words.py. Test: tests/ops/. Tried: nothing else; it is a few hundred bytes.
#include "common.cuh"

__global__ void set_words(i32* __restrict__ words, const i32* __restrict__ places, const i32* __restrict__ values,
                          int k) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < k && places[i] >= 0) words[places[i]] = values[i];
}
