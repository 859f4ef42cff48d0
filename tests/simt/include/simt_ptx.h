// The twins of the functions in cuda_src/ptx.cuh, which holds all inline PTX; defining its guard keeps it out. Same
// names, same signatures (tests/simt/test_emulator.py compares the two files).
#ifndef SIMT_PTX_H
#define SIMT_PTX_H
#define CUPLAMA_PTX_CUH

SIMT_FN uint4 load_streamed(const void* p) { return *static_cast<const uint4*>(p); }

#endif
