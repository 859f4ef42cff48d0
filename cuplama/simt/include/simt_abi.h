// What the kernel side (simt.h) and the runtime (runtime.cpp) share.
#ifndef SIMT_ABI_H
#define SIMT_ABI_H
namespace simt {
struct Lane {  // what a lane brings to a warp collective, and what it takes away
  unsigned in[16], out[16];
};
enum Op {  // kinds of warp collective; lanes that meet must agree on it
  SYNCWARP, SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ALL, ANY, MATCH_ANY, MATCH_ALL, REDUCE_ADD_S32, REDUCE_ADD_U32,
  REDUCE_MIN_S32, REDUCE_MIN_U32, REDUCE_MAX_S32, REDUCE_MAX_U32, REDUCE_AND, REDUCE_OR, REDUCE_XOR, LDMATRIX,
  LDMATRIX_TRANS, MMA_F16_16816, MMA_BF16_16816, MMA_F16_1688, MMA_BF16_1688, MMA_TF32_1688, MMA_TF32_1684, MMA_S8_16832,
  STMATRIX, STMATRIX_TRANS
};
}  // namespace simt
#endif
