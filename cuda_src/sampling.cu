// From logits to a token, without a copy to the host.
//
//   penalize      y[b,V] = logits, with repetition, presence and frequency penalties, bias, and stop tokens shut out
//   sample        token[b] = argmax(z + g) over the tokens that top-k, top-p and min-p keep, or argmax(logits);
//                 -1 for a row with a NaN, with +infinity, or with nothing but -infinity
//   count_token   seen[i, token[i]] += 2, unless it is -1
//   logprobs      log-softmax of the token drawn and of the N largest
//
//   z = (logit - max) / temperature, g: Gumbel noise from Philox 4x32-10. Logits f32 [b, V]; settings [b]; rows are
//   independent, so a row's token does not depend on the batch.
//
// The kept set is exact, not approximate. A float's bits, mapped to an integer that orders as the float does (its key),
// make top-k and top-p the same search: the smallest key with a weight strictly above it that is below a limit. The
// weight is 1 and the limit k for top-k; for top-p the weight is the mass rint(exp(z) * 2^32), 64-bit integer, and
// the limit top_p times the sum. Integer sums have no order, so atomics cannot change a result, and equal logits stand
// or fall together. Four launches:
//
//   sample_max        maximum of each chunk of 2048 logits; clears the counters        grid (chunks, b), 256 threads
//   sample_histogram  count and mass of the tokens by bin of -z, 64 bins per unit      grid (chunks, b), 256 threads
//   sample_threshold  finds the bin of the threshold, gathers its keys (a few hundred as a rule; the row is read again
//                     when they do not fit), and descends their 4 bytes                grid b, one block per row
//   sample_draw       z + g of the kept tokens, 4 ids per Philox block; the maximum by a 64-bit atomic over
//                     (key of the score, complement of the id); the last block of a row writes the token
//
// Rows without top-k and top-p, and greedy rows, leave the second and third at once. logprobs: each chunk sums its
// exponentials and finds its own N largest by repeated maximum; a second launch adds the sums and merges the lists.
//
// A mass, min_p and g use expf, logf and log1pf of the device, which may differ from NumPy's in the last bit: a token
// whose mass lies exactly on the limit may be decided differently. Everything else is the same bit for bit.
//
// Ops: cuplama/ops/sampling.py. Tests: the registry's in tests/ops/test_ops.py, and of the drawn frequencies
// tests/ops/test_sampling_statistics.py. Benchmark: `cuplama kernels bench`.
// Not taken: one block per row alone, which would compute the noise of a large vocabulary on one multiprocessor.
#include "sampling.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = 2048;  // logits per block; ops/sampling.py sizes the grids with it
constexpr int BINS = 2048;
constexpr float BINS_PER_UNIT = 64.f;
constexpr int LISTED = 4096;  // keys of a bin that fit in shared memory

// The maximum of a row from those of its chunks. Every warp computes it.
__device__ __forceinline__ float row_max(const f32* chunk_max, int chunks) {
    float most = -infinity();
    for (int i = threadIdx.x % WARP; i < chunks; i += WARP) most = fmaxf(most, chunk_max[i]);
    return warp_max(most);
}

// ---- penalties ------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(THREADS)
    penalize(const f32* __restrict__ logits, const i32* __restrict__ seen, const f32* __restrict__ bias,
             const i32* __restrict__ stop_ids, const i32* __restrict__ positions, const i32* __restrict__ min_positions,
             const f32* __restrict__ repetition, const f32* __restrict__ presence, const f32* __restrict__ frequency,
             f32* __restrict__ y, int V, int m) {
    const int row = blockIdx.y, id = blockIdx.x * THREADS + threadIdx.x;
    if (id >= V) return;
    const i64 at = i64(row) * V + id;
    float x = logits[at];
    const int times = seen[at];
    if (times > 0) x = x > 0.f ? x / repetition[row] : __fmul_rn(x, repetition[row]);
    const int count = times >> 1;  // generated
    if (count > 0) x = __fadd_rn(x, -__fadd_rn(presence[row], __fmul_rn(frequency[row], float(count))));
    if (bias) x = __fadd_rn(x, bias[at]);
    if (positions[row] < min_positions[row])
        for (int i = 0; i < m; i++)
            if (stop_ids[i64(row) * m + i] == id) x = -infinity();
    y[at] = x;
}

__global__ void __launch_bounds__(THREADS)
    count_token(i32* __restrict__ seen, const i32* __restrict__ token, int b, int V) {
    const int row = blockIdx.x * THREADS + threadIdx.x;
    if (row < b && token[row] >= 0) seen[i64(row) * V + token[row]] += 2;
}

// ---- the draw -------------------------------------------------------------------------------------------------------

struct Row {  // logits of one row as z, four at a time
    const f32* logits;
    int V;
    float largest, temperature;
    bool vectorized;

    __device__ __forceinline__ Row(const f32* all, int row, int V, float largest, float temperature)
        : logits(all + i64(row) * V), V(V), largest(largest), temperature(temperature),
          vectorized(V % 4 == 0 && aligned(all)) {}

    // z of ids at .. at+3; -infinity beyond the end.
    __device__ __forceinline__ Pack<f32, 4> operator()(int at) const {
        Pack<f32, 4> x = load_row<4>(logits, at, V, vectorized);
#pragma unroll
        for (int i = 0; i < 4; i++) x.v[i] = at + i < V ? (x.v[i] - largest) / temperature + 0.f : -infinity();
        return x;
    }
};

__device__ __forceinline__ u64 mass_of(float z) { return u64(rintf(expf(z) * 4294967296.f)); }
__device__ __forceinline__ int bin_of(float z) { return int(fminf(-z * BINS_PER_UNIT, BINS - 1)); }
__device__ __forceinline__ bool limits_k(int top_k, int V) { return top_k > 0 && top_k < V; }

__global__ void __launch_bounds__(THREADS)
    sample_max(const f32* __restrict__ logits, f32* __restrict__ chunk_max, u64* __restrict__ counts,
               u64* __restrict__ masses, u64* __restrict__ best, u32* __restrict__ finished, int V) {
    const int row = blockIdx.y, first = blockIdx.x * CHUNK, end = min(first + CHUNK, V);
    float most = -infinity();
    for (int id = first + threadIdx.x; id < end; id += THREADS) most = fmaxf(most, logits[i64(row) * V + id]);
    most = block_max(most);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < BINS; i += gridDim.x * THREADS)
        counts[row * BINS + i] = 0, masses[row * BINS + i] = 0;
    if (threadIdx.x == 0) {
        chunk_max[row * gridDim.x + blockIdx.x] = most;
        if (blockIdx.x == 0) best[row] = 0, finished[row] = 0;
    }
}

// counts and masses [b, BINS]: of the tokens in each bin, the largest z first.
__global__ void __launch_bounds__(THREADS)
    sample_histogram(const f32* __restrict__ logits, const f32* __restrict__ chunk_max,
                     const f32* __restrict__ temperature, const i32* __restrict__ top_k, const f32* __restrict__ top_p,
                     u64* __restrict__ counts, u64* __restrict__ masses, int V) {
    const int row = blockIdx.y;
    if (temperature[row] == 0.f || !(limits_k(top_k[row], V) || top_p[row] < 1.f)) return;
    // A mass in two parts, since shared memory adds 32-bit integers best: 2048 times 65535 is less than 2^32.
    __shared__ u32 count[BINS], low[BINS], high[BINS];
    for (int i = threadIdx.x; i < BINS; i += THREADS) count[i] = low[i] = high[i] = 0;
    __syncthreads();
    const Row zs(logits, row, V, row_max(chunk_max + row * gridDim.x, gridDim.x), temperature[row]);
    const int first = blockIdx.x * CHUNK, end = min(first + CHUNK, V);
    for (int at = first + 4 * threadIdx.x; at < end; at += 4 * THREADS) {
        const Pack<f32, 4> z = zs(at);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!(z.v[i] > -infinity())) continue;
            const int bin = bin_of(z.v[i]);
            const u64 mass = mass_of(z.v[i]);
            atomicAdd(&count[bin], 1u);
            if (mass > 0) {
                atomicAdd(&low[bin], u32(mass & 0xffff));
                atomicAdd(&high[bin], u32(mass >> 16));
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (count[i] == 0) continue;
        atomicAdd(&counts[row * BINS + i], u64(count[i]));
        atomicAdd(&masses[row * BINS + i], (u64(high[i]) << 16) + low[i]);
    }
}

// The last of the bins 0 .. last that is not empty and has less than `limit` above it, where `above` counts what lies
// above bin 0; on return it counts what lies above the bin. Bin 0 if there is none, which only a row without any finite
// logit brings about.
__device__ __forceinline__ int find_bin(const u64* weights, int bins, int last, u64 limit, u64& above) {
    __shared__ u64 warp_total[WARP], found_above;
    __shared__ int found;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int each = (bins + blockDim.x - 1) / blockDim.x, first = threadIdx.x * each;
    const int end = min(first + each, last + 1);
    u64 own = 0;
    for (int i = first; i < end; i++) own += weights[i];
    u64 up_to = own;  // over the lanes of the warp
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const u64 other = __shfl_up_sync(ALL_LANES, up_to, lanes);
        if (lane >= lanes) up_to += other;
    }
    if (lane == WARP - 1) warp_total[warp] = up_to;
    if (threadIdx.x == 0) found = -1, found_above = above;
    __syncthreads();
    u64 running = above + up_to - own, mine_above = 0;
    for (int i = 0; i < warp; i++) running += warp_total[i];
    int mine = -1;
    for (int i = first; i < end; i++) {
        if (weights[i] > 0 && running < limit) mine = i, mine_above = running;
        running += weights[i];
    }
    if (mine >= 0) atomicMax(&found, mine);
    __syncthreads();
    if (mine >= 0 && mine == found) found_above = mine_above;
    __syncthreads();
    const int bin = max(found, 0);
    above = found_above;
    __syncthreads();
    return bin;
}

struct BinKeys {  // the keys of one bin: listed in shared memory, or the row itself where they are too many
    const u32* list;
    int count, bin;

    template <typename F>
    __device__ __forceinline__ void each(const Row& zs, F f) const {
        if (count <= LISTED) {
            for (int i = threadIdx.x; i < count; i += blockDim.x) f(list[i]);
        } else {
            for (int at = 4 * threadIdx.x; at < zs.V; at += 4 * blockDim.x) {
                const Pack<f32, 4> z = zs(at);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (z.v[i] > -infinity() && bin_of(z.v[i]) == bin) f(key_of(z.v[i]));
            }
        }
    }
};

__device__ __forceinline__ BinKeys gather(const Row& zs, int bin, u32* list) {
    __shared__ int count;
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    BinKeys{list, LISTED + 1, bin}.each(zs, [&](u32 key) {
        const int at = atomicAdd(&count, 1);
        if (at < LISTED) list[at] = key;
    });
    __syncthreads();
    return {list, count, bin};
}

// The smallest of the keys that has less than `limit` above it; keys below `lowest` do not take part.
template <typename Weight>
__device__ __forceinline__ u32 descend(const Row& zs, const BinKeys& keys, u32 lowest, u64 limit, u64 above,
                                       Weight weight) {
    __shared__ u64 weights[256];  // by one byte of the key, the largest first
    u32 prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) weights[i] = 0;
        __syncthreads();
        const u32 decided = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
        keys.each(zs, [&](u32 key) {
            if (key < lowest || (key & decided) != prefix) return;
            atomicAdd(&weights[255 - (key >> shift & 255)], weight(key));
        });
        __syncthreads();
        prefix |= u32(255 - find_bin(weights, 256, 255, limit, above)) << shift;
    }
    return prefix;
}

// threshold [b]: the smallest key of z that top-k and top-p keep; 0 keeps every token.
__global__ void __launch_bounds__(1024)
    sample_threshold(const f32* __restrict__ logits, const f32* __restrict__ chunk_max, const u64* __restrict__ counts,
                     const u64* __restrict__ masses, const f32* __restrict__ temperature, const i32* __restrict__ top_k,
                     const f32* __restrict__ top_p, u32* __restrict__ threshold, int V, int chunks) {
    const int row = blockIdx.x, k = top_k[row];
    const double p = top_p[row];
    if (temperature[row] == 0.f || !(limits_k(k, V) || p < 1)) {
        if (threadIdx.x == 0) threshold[row] = 0;
        return;
    }
    __shared__ u32 list[LISTED];
    counts += row * BINS, masses += row * BINS;
    const Row zs(logits, row, V, row_max(chunk_max + row * chunks, chunks), temperature[row]);
    BinKeys keys{list, 0, -1};
    u32 lowest = 0;
    int last = BINS - 1;
    if (limits_k(k, V)) {
        u64 above = 0;
        last = find_bin(counts, BINS, last, k, above);
        keys = gather(zs, last, list);
        lowest = descend(zs, keys, 0, k, above, [](u32) { return u64(1); });
    }
    if (p < 1) {
        u64 sum = 0, above = 0;  // sum: the mass that top-k keeps
        for (int i = threadIdx.x; i < last; i += blockDim.x) sum += masses[i];
        if (keys.bin < 0)
            sum += threadIdx.x == 0 ? masses[last] : 0;
        else
            keys.each(zs, [&](u32 key) { sum += key >= lowest ? mass_of(value_of(key)) : 0; });
        sum = block_sum(sum);
        const u64 limit = max(u64(1), u64(ceil(p * double(sum))));  // above < p * sum, or nothing above
        const int bin = find_bin(masses, BINS, last, limit, above);
        if (bin != keys.bin) keys = gather(zs, bin, list);
        lowest = descend(zs, keys, lowest, limit, above, [](u32 key) { return mass_of(value_of(key)); });
    }
    if (threadIdx.x == 0) threshold[row] = lowest;
}

__global__ void __launch_bounds__(THREADS)
    sample_draw(const f32* __restrict__ logits, const f32* __restrict__ chunk_max, const f32* __restrict__ temperature,
                const f32* __restrict__ min_p, const u64* __restrict__ seed, const i32* __restrict__ positions,
                const u32* __restrict__ threshold, u64* __restrict__ best, u32* __restrict__ finished,
                i32* __restrict__ token, int V) {
    const int row = blockIdx.y, first = blockIdx.x * CHUNK, end = min(first + CHUNK, V);
    u64 mine = 0;
    if (temperature[row] == 0.f) {
        for (int id = first + threadIdx.x; id < end; id += THREADS) {
            const float x = logits[i64(row) * V + id];
            const u64 rank = !(x < infinity()) ? BROKEN : x > -infinity() ? rank_of(x, id) : 0;
            mine = rank > mine ? rank : mine;
        }
    } else {
        const Row zs(logits, row, V, row_max(chunk_max + row * gridDim.x, gridDim.x), temperature[row]);
        const u32 lowest = threshold[row];
        const float min_mass = min_p[row];
        for (int at = first + 4 * threadIdx.x; at < end; at += 4 * THREADS) {
            const Pack<f32, 4> z = zs(at);
            bool kept[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (z.v[i] != z.v[i]) mine = BROKEN;  // the logit is a NaN, or it is the maximum and infinite
                kept[i] =
                    z.v[i] > -infinity() && key_of(z.v[i]) >= lowest && (min_mass <= 0.f || expf(z.v[i]) >= min_mass);
            }
            if (!(kept[0] || kept[1] || kept[2] || kept[3])) continue;
            u32 word[4];
            philox(at / 4, positions[row], seed[row], word);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (!kept[i]) continue;
                const u64 rank = rank_of(__fadd_rn(z.v[i], gumbel(word[i])), at + i);
                mine = rank > mine ? rank : mine;
            }
        }
    }
    mine = block_max(mine);
    if (threadIdx.x > 0) return;
    atomicMax(&best[row], mine);
    __threadfence();
    if (atomicAdd(&finished[row], 1u) == gridDim.x - 1) {
        __threadfence();  // what the other blocks wrote before they counted
        const u64 winner = atomicMax(&best[row], u64(0));
        token[row] = winner == 0 || winner == BROKEN ? -1 : id_of(winner);
    }
}

// ---- log-probabilities ----------------------------------------------------------------------------------------------

// chunk_sum [b, chunks]: sum of exp(logit - chunk_max); largest [b, chunks, N]: the chunk's N largest, in order.
__global__ void __launch_bounds__(THREADS)
    logprobs_chunk(const f32* __restrict__ logits, f32* __restrict__ chunk_max, f32* __restrict__ chunk_sum,
                   u64* __restrict__ largest, int N, int V) {
    constexpr int EACH = CHUNK / THREADS;
    const int row = blockIdx.y, chunk = row * gridDim.x + blockIdx.x;
    float x[EACH], most = -infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int id = blockIdx.x * CHUNK + i * THREADS + threadIdx.x;
        x[i] = id < V ? logits[i64(row) * V + id] : -infinity();
        most = fmaxf(most, x[i]);
    }
    most = block_max(most);
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += x[i] > -infinity() ? expf(x[i] - most) : 0.f;
    sum = block_sum(sum);
    if (threadIdx.x == 0) chunk_max[chunk] = most, chunk_sum[chunk] = sum;

    u64 rank[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int id = blockIdx.x * CHUNK + i * THREADS + threadIdx.x;
        rank[i] = id < V ? rank_of(x[i], id) : 0;
    }
    for (int place = 0; place < N; place++) {
        u64 mine = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) mine = rank[i] > mine ? rank[i] : mine;
        mine = block_max(mine);
#pragma unroll
        for (int i = 0; i < EACH; i++) rank[i] = rank[i] == mine ? 0 : rank[i];
        if (threadIdx.x == 0) largest[i64(chunk) * N + place] = mine;
    }
}

// One block per row, at least a thread per chunk.
__global__ void __launch_bounds__(1024)
    logprobs_merge(const f32* __restrict__ logits, const i32* __restrict__ token, const f32* __restrict__ chunk_max,
                   const f32* __restrict__ chunk_sum, const u64* __restrict__ largest, f32* __restrict__ logprob,
                   i32* __restrict__ top_ids, f32* __restrict__ top_logprobs, int N, int V, int chunks) {
    const int row = blockIdx.x, chunk = row * chunks + threadIdx.x;
    const bool there = threadIdx.x < chunks;
    const float mine = there ? chunk_max[chunk] : -infinity();
    const float most = block_max(mine);
    const float log_sum = logf(block_sum(there ? expf(mine - most) * chunk_sum[chunk] : 0.f));
    if (threadIdx.x == 0) logprob[row] = logits[i64(row) * V + max(token[row], 0)] - most - log_sum;
    int next = 0;  // place in the chunk's list
    for (int place = 0; place < N; place++) {
        const u64 head = there && next < N ? largest[i64(chunk) * N + next] : 0;
        const u64 winner = block_max(head);
        if (head == winner) next++;
        if (threadIdx.x == 0) {
            top_ids[row * N + place] = id_of(winner);
            top_logprobs[row * N + place] = value_of(u32(winner >> 32)) - most - log_sum;
        }
    }
}
