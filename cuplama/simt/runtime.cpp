// The emulator's execution model. One OS thread runs everything; each CUDA thread is a fiber with its own stack.
//
//   fibers     A fiber runs until it must wait (barrier, warp collective), polls (volatile or acquire load, an atomic
//              that changes nothing, an mbarrier test) or ends; then the next ready fiber of its block runs. When all
//              fibers of a block poll, the scheduler goes on to the other blocks, starting new ones, so blocks that
//              spin on each other make progress. A full round in which nothing changes, often enough, is a deadlock.
//   memory     g++ -fsanitize=thread turns every load and store of the kernel into a call of __tsan_readN/__tsan_writeN.
//              Those are defined here: an address must lie in this fiber's stack, in the block's shared memory, in an
//              argument's array, or in the image (device globals, constants). Anything else is a fault.
//   shared     `__shared__` is `static`, so a variable has one address; its bytes are swapped when the scheduler changes
//              the block. The build pads each with a guard zone and passes the list of them. Dynamic shared memory is a
//              buffer per block.
//   races      Logical time G counts synchronisation events. Each access leaves (thread, time of the thread's last
//              event) in a shadow cell of its 4, 2 or 1 bytes. It happens before thread u's access if u has since met
//              that thread, directly or through others, in a barrier, warp collective or mbarrier: u knows that from
//              `floor` (whole block), `warp.floor` and `lanes` (its warp), and `clock` (the rest; only if needed).
//   faults     fill in the report and leave for good; the fibers are abandoned.

#include "include/simt_abi.h"

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <link.h>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unordered_map>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <ucontext.h>
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef uintptr_t uptr;

struct uint3 { u32 x, y, z; };

using simt::Lane;

namespace {

const char* const OP_NAMES[] = {
    "__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync", "__all_sync",
    "__any_sync", "__match_any_sync", "__match_all_sync", "__reduce_add_sync", "__reduce_add_sync", "__reduce_min_sync",
    "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",
    "__reduce_xor_sync", "ldmatrix", "ldmatrix.trans", "mma.m16n8k16.f16", "mma.m16n8k16.bf16", "mma.m16n8k8.f16",
    "mma.m16n8k8.bf16", "mma.m16n8k8.tf32", "mma.m16n8k4.tf32", "mma.m16n8k32.s8", "stmatrix", "stmatrix.trans"};

// ---- what Python passes --------------------------------------------------------------------------------------------
struct Region { u64 low, high; u32 writable, argument; };
struct SharedVariable { u64 low, bytes; const char* name; };
struct Launch {
  void (*kernel)(void**);
  void** args;
  u32 grid[3], block[3];
  u64 dynamic_shared;
  const Region* regions;
  u64 region_count;
  const SharedVariable* variables;
  u64 variable_count;
  const char* const* argument_names;
  u64 seed, stack_bytes, max_blocks;
  double timeout;
  u32 check, race_check;
  char* report;
  u64 report_bytes;
};

// ---- state -----------------------------------------------------------------------------------------------------------
struct Place { const char* what; const char* file; int line; };
enum State : u8 { READY, AT_BARRIER, AT_NAMED, IN_WARP, EXITED };

struct Access { u32 time, pc; u16 thread, flags; };  // flags of an access
enum : u16 { ATOMIC = 1, IN_FLIGHT = 2 };
struct Cell { Access write, read[2]; };

typedef std::shared_ptr<std::vector<u32>> Clock;     // per thread of the block: known up to this time

struct Copy { void* to; const void* from; u32 bytes, source_bytes, thread, group, pc, time; };

struct Block;
struct Fiber {
  void* stack_pointer;
  uptr stack_low;
  Block* block;
  u32 thread, time, warp_mask;
  u64 polls_at;                                       // where it last polled, 0: never
  State state;
  u8 op;
  Place place;
  Lane* lane;                                         // at the top of its stack, where the hooks let it pass
  u32 lanes[32];                                      // known times of the lanes of its warp
  Clock clock;
  std::vector<Copy> copies;                           // cp.async not yet waited for
  u32 groups;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

struct Warp { u32 floor, exists, exited; };
struct Named { u32 count, arrived; std::vector<u32> threads; std::vector<u32> waiting; };
struct MBarrier {
  u32 count, pending, phase;
  long long bytes;
  std::vector<Copy> copies;
  std::vector<u32> clock, done;
};
struct Shadow { std::vector<Cell> cells; };

struct Block {
  uint3 index;
  u32 floor, born, alive, at_barrier, barrier_sum, barrier_result;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<u32> ready, polling;                    // ready: ring buffer
  u32 head, tail;
  std::string unwritten;                              // report of a read of bytes that nobody has written so far
  u8* stacks;
  u8* dynamic;
  std::vector<Shadow> shadows;                        // 0: dynamic; 1 + i: variable i
  std::vector<std::vector<u8>> saved;                 // bytes of the variables while another block runs
  std::map<int, Named> named;
  std::unordered_map<uptr, MBarrier> mbarriers;
};

const u64 GUARD = 256 << 10;                           // around dynamic shared memory: as far as a block can reach
const Launch* launch;
u32 threads_per_block;
u32 now;                                              // G, the count of synchronisation events
u64 progress;
int granule_shift;                                    // shadow cells cover 1 << granule_shift bytes
uptr image_low, image_high, shared_low, shared_high;
std::vector<u16> line_variable;                       // by 64-byte line of [shared_low, shared_high): 1 + variable
std::vector<u8> touched;                              // variables that this launch has used
Block* current_block;
Fiber* current;
uptr stack_low, stack_size;
bool checking;
Region last_region;
sigjmp_buf escape;
bool failed;
std::vector<std::unique_ptr<Block>> idle_blocks;
u8 signal_stack[65536];  // not a local: function-local statics of the object are shared variables
std::vector<float> half_values;

// ---- reports -------------------------------------------------------------------------------------------------------
#define ADDRESS(pc) (unsigned long long)(pc)

std::string format(const char* text, ...) {
  va_list list;
  va_start(list, text);
  char buffer[2048];
  vsnprintf(buffer, sizeof buffer, text, list);
  va_end(list);
  return buffer;
}
// Python replaces {pc:hex} by file:line.
std::string at_pc(u64 pc) { return format("{pc:%llx}", ADDRESS(pc)); }
std::string at(const Place& p) { return format("%s:%d", p.file, p.line); }
uint3 coordinates(u32 i, const u32* shape) {
  return uint3{i % shape[0], i / shape[0] % shape[1], i / (shape[0] * shape[1])};
}
std::string thread_name(const Block& block, u32 thread) {
  uint3 t = coordinates(thread, launch->block);
  (void)block;
  return format("(%u, %u, %u)", t.x, t.y, t.z);
}

[[noreturn]] void leave() {
  failed = true;
  siglongjmp(escape, 1);
}

std::string report_text(const char* kind, const Fiber* fiber, const std::string& where, const std::string& detail) {
  uint3 b{0, 0, 0};
  std::string thread = "?";
  if (fiber != nullptr) {
    b = fiber->block->index;
    thread = thread_name(*fiber->block, fiber->thread);
  }
  return format("%s\x1f(%u, %u, %u)\x1f%s\x1f", kind, b.x, b.y, b.z, thread.c_str()) + where + "\x1f" + detail;
}

[[noreturn]] void fault(const char* kind, const Fiber* fiber, const std::string& where, const std::string& detail) {
  std::string text = report_text(kind, fiber, where, detail);
  if (fiber != nullptr && !fiber->block->unwritten.empty() && strcmp(kind, "race") != 0) text = fiber->block->unwritten;
  snprintf(launch->report, launch->report_bytes, "%s", text.c_str());
  leave();
}

void require_written(const Block& b) {
  if (!b.unwritten.empty()) fault("uninitialised-shared", &b.fibers[0], "", "");
}

// ---- context switch ------------------------------------------------------------------------------------------------
void* scheduler_stack_pointer;
#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
ucontext_t scheduler_context;
#endif

void fiber_main();

void prepare(Fiber& f) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack_low + launch->stack_bytes - 72 - sizeof(Lane));
  top[0] = nullptr;                                   // a return address for fiber_main, which never returns
  top[-1] = reinterpret_cast<void*>(&fiber_main);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  f.stack_pointer = top - 7;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = reinterpret_cast<void*>(f.stack_low);
  f.context.uc_stack.ss_size = launch->stack_bytes - sizeof(Lane);
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
  *reinterpret_cast<u64*>(f.stack_low) = 0x5afe57ac5afe57acull;
}

void enter(Fiber& f) {
  current = &f;
  stack_low = f.stack_low;
}

// Gives the processor to the next ready fiber of the block, or to the scheduler if there is none.
void switch_away(Fiber& from) {
  if (*reinterpret_cast<u64*>(from.stack_low) != 0x5afe57ac5afe57acull)
    fault("stack-overflow", &from, at(from.place), format("the fiber's stack of %llu bytes is too small", ADDRESS(launch->stack_bytes)));
  Block& b = *from.block;
  if (b.head != b.tail) {
    Fiber& to = b.fibers[b.ready[b.head]];
    b.head = (b.head + 1) % u32(b.ready.size());
    if (&to == &from) return;
    enter(to);
#if defined(__x86_64__)
    simt_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
  } else {
    current = nullptr;
#if defined(__x86_64__)
    simt_switch(&from.stack_pointer, scheduler_stack_pointer);
#else
    swapcontext(&from.context, &scheduler_context);
#endif
  }
}

void make_ready(Block& b, u32 thread) {
  b.fibers[thread].state = READY;
  b.ready[b.tail] = thread;
  b.tail = (b.tail + 1) % u32(b.ready.size());
}

void poll(u64 pc) {
  Fiber& f = *current;
  f.polls_at = pc;
  f.block->polling.push_back(f.thread);
  switch_away(f);
}

// ---- shared memory -------------------------------------------------------------------------------------------------
// The variable (0: dynamic) and the offset of a shared address; false if the address is not in shared memory at all.
struct Spot { u32 variable; u64 offset, bytes; uptr base; };
bool find_shared(uptr p, Spot& spot) {
  const Block& b = *current_block;
  uptr base = uptr(b.dynamic) + GUARD;
  if (p - (base - GUARD) < launch->dynamic_shared + 2 * GUARD) {
    spot = Spot{0, p - base, launch->dynamic_shared, base};
    return true;
  }
  if (p - shared_low < shared_high - shared_low) {
    u32 v = line_variable[(p - shared_low) >> 6];
    if (v == 0) return false;
    const SharedVariable& s = launch->variables[v - 1];
    spot = Spot{v, p - s.low, s.bytes, uptr(s.low)};
    return true;
  }
  return false;
}
bool is_shared(const void* p) { Spot s; return find_shared(uptr(p), s) && s.offset < s.bytes; }

const char* shared_name(u32 variable) { return variable == 0 ? "dynamic shared memory" : launch->variables[variable - 1].name; }

void touch(Block& b, u32 variable, u64 bytes) {
  std::vector<Cell>& cells = b.shadows[variable].cells;
  if (cells.empty()) cells.resize((bytes >> granule_shift) + 1);
  if (variable != 0) touched[variable - 1] = 1;
}

void refine(std::vector<std::unique_ptr<Block>>& blocks, int from, int to) {
  for (auto& b : blocks)
    for (Shadow& s : b->shadows) {
      if (s.cells.empty()) continue;
      std::vector<Cell> fine(s.cells.size() << (from - to));
      for (size_t i = 0; i < fine.size(); ++i) fine[i] = s.cells[i >> (from - to)];
      s.cells.swap(fine);
    }
}
std::vector<std::unique_ptr<Block>> alive;

u32 known(const Fiber& u, u32 thread) {
  const Block& b = *u.block;
  u32 t = b.floor;
  if (thread / 32 == u.thread / 32) {
    t = std::max(t, b.warps[thread / 32].floor);
    t = std::max(t, u.lanes[thread % 32]);
  }
  if (u.clock) t = std::max(t, (*u.clock)[thread]);
  return t;
}
inline bool before(const Fiber& u, const Access& a) {
  return a.time < u.block->floor || a.thread == u.thread || a.time < known(u, a.thread);
}

std::string race_detail(const Fiber& f, const Access& old, const char* old_kind, u64 pc, const char* kind, const Spot& s) {
  return format("thread %s %s byte %lld of %s at ", thread_name(*f.block, f.thread).c_str(), kind, (long long)s.offset,
                shared_name(s.variable)) + at_pc(pc) +
         format("\nthread %s %s it at ", thread_name(*f.block, old.thread).c_str(), old_kind) + at_pc(old.pc + image_low) +
         "\nno barrier orders the two";
}

enum Kind { READ, WRITE, ATOMIC_UPDATE, ASYNC_WRITE };

void shared_access(Fiber& f, Spot s, u32 bytes, Kind kind, u64 pc) {
  static const char* const DID[] = {"reads", "writes", "updates", "copies (cp.async) to"};
  static const char* const PAST[] = {"read", "wrote", "updated", "copied (cp.async) to"};
  if (s.offset + bytes > s.bytes || s.offset > s.bytes) {
    long long offset = (long long)s.offset;
    fault("shared-out-of-bounds", &f, at_pc(pc), format("%u bytes at byte %lld of %s, which has %llu bytes", bytes, offset,
          shared_name(s.variable), ADDRESS(s.bytes)));
  }
  if (bytes == 0) return;
  Block& b = *f.block;
  while (granule_shift > 0 && ((s.offset | bytes) & ((1u << granule_shift) - 1)) != 0) {
    refine(alive, granule_shift, granule_shift - 1);
    refine(idle_blocks, granule_shift, granule_shift - 1);
    --granule_shift;
  }
  touch(b, s.variable, s.bytes);
  Cell* cell = &b.shadows[s.variable].cells[s.offset >> granule_shift];
  Cell* end = cell + std::max(1u, bytes >> granule_shift);
  Access mine{f.time, u32(pc - image_low), u16(f.thread), u16(kind == ATOMIC_UPDATE ? ATOMIC : kind == ASYNC_WRITE ? IN_FLIGHT : 0)};
  bool races = launch->race_check;
  for (; cell != end; ++cell, s.offset += 1u << granule_shift) {
    Access& w = cell->write;
    bool written = w.time >= b.born;
    // Perhaps another thread has yet to write it, and a race is the better report: wait for the next barrier.
    if ((kind == READ || kind == ATOMIC_UPDATE) && !written && b.unwritten.empty())
      b.unwritten = report_text("uninitialised-shared", &f, at_pc(pc), format("byte %lld of %s has not been written by this block",
                                (long long)s.offset, shared_name(s.variable)));
    if (written && (w.flags & IN_FLIGHT))
      fault("async-in-flight", &f, at_pc(pc), format("thread %s %s byte %lld of %s before the asynchronous copy to it has been waited for; "
            "the copy was issued by thread %s at ", thread_name(b, f.thread).c_str(), DID[kind], (long long)s.offset,
            shared_name(s.variable), thread_name(b, w.thread).c_str()) + at_pc(w.pc + image_low));
    if (races && w.time >= b.floor && w.thread != f.thread && !(kind == ATOMIC_UPDATE && (w.flags & ATOMIC)) && !before(f, w))
      fault("race", &f, at_pc(pc), race_detail(f, w, PAST[w.flags & ATOMIC ? ATOMIC_UPDATE : WRITE], pc, DID[kind], s));
    if (kind == READ) {
      Access *r0 = &cell->read[0], *r1 = &cell->read[1];
      if (r0->time < b.floor || r0->thread == f.thread) *r0 = mine;
      else if (r1->time < b.floor || r1->thread / 32 == r0->thread / 32 || f.thread / 32 != r0->thread / 32) *r1 = mine;
    } else {
      if (races)
        for (Access& r : cell->read)
          if (r.time >= b.floor && r.thread != f.thread && !before(f, r))
            fault("race", &f, at_pc(pc), race_detail(f, r, "read", pc, DID[kind], s));
      // An atomic does not hide the plain write that the same thread made just before it.
      if (!(kind == ATOMIC_UPDATE && written && w.thread == f.thread && w.time == f.time && w.flags == 0)) w = mine;
    }
  }
}

// An asynchronous copy has arrived: the bytes are now an ordinary write of its thread at `time`.
void land(Fiber& f, const Copy& c, u32 time) {
  Spot s;
  memcpy(c.to, c.from, c.source_bytes);
  memset(static_cast<u8*>(c.to) + c.source_bytes, 0, c.bytes - c.source_bytes);
  ++progress;
  if (!checking || !find_shared(uptr(c.to), s)) return;
  Cell* cell = &f.block->shadows[s.variable].cells[s.offset >> granule_shift];
  for (u32 i = 0; i < std::max(1u, c.bytes >> granule_shift); ++i)
    cell[i].write = Access{time, c.pc, u16(c.thread), 0};
}

// ---- global memory -------------------------------------------------------------------------------------------------
std::string region_detail(uptr p, u32 bytes, bool write) {
  const Region* nearest = nullptr;
  u64 distance = ~0ull;
  for (u64 i = 0; i < launch->region_count; ++i) {
    const Region& r = launch->regions[i];
    u64 d = p < r.low ? r.low - p : p >= r.high ? p - r.high : 0;
    if (d < distance) distance = d, nearest = &r;
  }
  std::string text = format("%s of %u bytes at %#llx", write ? "write" : "read", bytes, ADDRESS(p));
  if (p < 4096) return text + ": a null pointer";
  if (nearest == nullptr || distance > (1u << 20)) return text + ": in no array of the launch";
  const char* name = launch->argument_names[nearest->argument];
  return text + format(": byte %lld of argument '%s', which has %llu bytes", (long long)(p - nearest->low), name,
                       ADDRESS(nearest->high - nearest->low));
}

void global_access(Fiber& f, uptr p, u32 bytes, bool write, u64 pc) {
  if (p >= last_region.low && p + bytes <= last_region.high && (!write || last_region.writable)) return;
  for (u64 i = 0; i < launch->region_count; ++i) {
    const Region& r = launch->regions[i];
    if (p >= r.low && p + bytes <= r.high) {
      if (write && !r.writable)
        fault("write-to-const", &f, at_pc(pc), format("argument '%s' is a const pointer", launch->argument_names[r.argument]));
      last_region = r;
      return;
    }
  }
  if (p >= image_low && p + bytes <= image_high) return;
  fault("global-out-of-bounds", &f, at_pc(pc), region_detail(p, bytes, write));
}

void access(Fiber& f, const void* address, u32 bytes, Kind kind, u64 pc) {
  uptr p = uptr(address);
  if (p - f.stack_low < launch->stack_bytes) return;
  if (kind != READ) ++progress;
  if (!checking) return;
  Spot s;
  if (find_shared(p, s)) shared_access(f, s, bytes, kind, pc);
  else global_access(f, p, bytes, kind != READ, pc);
}

// ---- happens-before ------------------------------------------------------------------------------------------------
u32 tick() { return ++now; }

Clock full_clock(const Fiber& f) {
  u32 n = threads_per_block;
  Clock c = std::make_shared<std::vector<u32>>(n);
  for (u32 t = 0; t < n; ++t) (*c)[t] = known(f, t);
  return c;
}
void join(std::vector<u32>& into, const std::vector<u32>& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

// The threads have met: each now knows what any of them knew, and all that they did.
void meet(Block& b, const std::vector<u32>& threads) {
  u32 time = tick();
  if (threads.size() == b.fibers.size()) {
    b.floor = time;
    for (Fiber& f : b.fibers) f.time = time, f.clock.reset();
    return;
  }
  Clock c = full_clock(b.fibers[threads[0]]);
  for (u32 t : threads) join(*c, *full_clock(b.fibers[t]));
  for (u32 t : threads) (*c)[t] = time;
  for (u32 t : threads) b.fibers[t].clock = c, b.fibers[t].time = time;
}

void meet_warp(Block& b, u32 warp, u32 mask) {
  Warp& w = b.warps[warp];
  u32 time = tick();
  Fiber* lanes = &b.fibers[warp * 32];
  Clock first;
  bool differ = false;
  for (u32 m = mask; m != 0; m &= m - 1) {
    const Clock& c = lanes[__builtin_ctz(m)].clock;
    if (m == mask) first = c;
    else differ = differ || c != first;
  }
  Clock joined = first;
  if (differ) {
    joined = std::make_shared<std::vector<u32>>(threads_per_block);
    for (u32 m = mask; m != 0; m &= m - 1)
      if (const Clock& c = lanes[__builtin_ctz(m)].clock) join(*joined, *c);
  }
  if (mask == w.exists) {
    w.floor = time;
  } else {
    u32 known_lanes[32] = {};
    for (u32 m = mask; m != 0; m &= m - 1)
      for (int i = 0; i < 32; ++i) known_lanes[i] = std::max(known_lanes[i], lanes[__builtin_ctz(m)].lanes[i]);
    for (u32 m = mask; m != 0; m &= m - 1) known_lanes[__builtin_ctz(m)] = time;
    for (u32 m = mask; m != 0; m &= m - 1) memcpy(lanes[__builtin_ctz(m)].lanes, known_lanes, sizeof known_lanes);
  }
  for (u32 m = mask; m != 0; m &= m - 1) {
    Fiber& f = lanes[__builtin_ctz(m)];
    f.time = time;
    if (differ) f.clock = joined;
  }
}

// ---- where the fibers of a block are, for reports --------------------------------------------------------------------
std::string census(const Block& b) {
  std::vector<std::pair<std::string, std::vector<u32>>> groups;
  for (const Fiber& f : b.fibers) {
    std::string text;
    if (f.state == EXITED) text = "has ended";
    else if (f.state == READY) text = f.polls_at == 0 ? "can run" : "polls at " + at_pc(f.polls_at);
    else text = std::string("waits in ") + f.place.what + " at " + at(f.place);
    if (groups.empty() || groups.back().first != text) {
      auto g = groups.begin();
      while (g != groups.end() && g->first != text) ++g;
      if (g == groups.end()) groups.push_back({text, {f.thread}});
      else g->second.push_back(f.thread);
    } else {
      groups.back().second.push_back(f.thread);
    }
  }
  std::string out;
  for (auto& [text, threads] : groups) {
    std::string ranges;
    for (size_t i = 0, shown = 0; i < threads.size(); ++shown) {
      size_t j = i;
      while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) ++j;
      if (shown == 8) { ranges += ", ..."; break; }
      if (i != 0) ranges += ", ";
      ranges += i == j ? format("%u", threads[i]) : format("%u-%u", threads[i], threads[j]);
      i = j + 1;
    }
    out += format("%sthread%s %s %s", out.empty() ? "" : "\n", threads.size() > 1 ? "s" : "", ranges.c_str(), text.c_str());
  }
  return out;
}

// ---- barriers ------------------------------------------------------------------------------------------------------
void check_barrier(Block& b, Fiber& last) {
  u32 exited = u32(b.fibers.size()) - b.alive;
  if (b.at_barrier == 0 || b.at_barrier != b.alive) return;
  const Fiber* waiting = nullptr;
  bool same = exited == 0;
  for (const Fiber& f : b.fibers) {
    if (f.state != AT_BARRIER) continue;
    if (waiting == nullptr) waiting = &f;
    same = same && f.place.line == waiting->place.line && strcmp(f.place.file, waiting->place.file) == 0;
  }
  if (!same)
    fault("barrier-divergence", waiting, at(waiting->place), "not all threads of the block reach this barrier:\n" + census(b));
  require_written(b);
  u32 time = tick();
  b.floor = time;
  b.barrier_result = b.barrier_sum;
  b.barrier_sum = 0;
  b.at_barrier = 0;
  ++progress;
  for (Fiber& f : b.fibers) {
    f.time = time;
    f.clock.reset();
    f.state = READY;
  }
  for (u32 i = 1; i <= b.fibers.size(); ++i) make_ready(b, (last.thread + i) % u32(b.fibers.size()));
}

void run_collective(Block& b, u32 warp, u32 mask, int op, const Fiber& last);

void exit_fiber() {
  Fiber& f = *current;
  Block& b = *f.block;
  for (const Copy& c : f.copies) land(f, c, f.time);
  f.copies.clear();
  f.state = EXITED;
  --b.alive;
  ++progress;
  u32 warp = f.thread / 32;
  Warp& w = b.warps[warp];
  w.exited |= 1u << (f.thread % 32);
  check_barrier(b, f);
  // A warp collective may have waited for this lane alone.
  for (u32 m = w.exists & ~w.exited; m != 0; m &= m - 1) {
    Fiber& lane = b.fibers[warp * 32 + u32(__builtin_ctz(m))];
    if (lane.state != IN_WARP) continue;
    u32 needed = lane.warp_mask & w.exists & ~w.exited;
    bool complete = true;
    for (u32 n = needed; n != 0; n &= n - 1) {
      const Fiber& other = b.fibers[warp * 32 + u32(__builtin_ctz(n))];
      complete = complete && other.state == IN_WARP && other.warp_mask == lane.warp_mask;
    }
    if (complete) {
      run_collective(b, warp, needed, lane.op, lane);
      for (u32 n = needed; n != 0; n &= n - 1) make_ready(b, warp * 32 + u32(__builtin_ctz(n)));
    }
  }
  switch_away(f);
  abort();
}

void fiber_main() {
  launch->kernel(launch->args);
  exit_fiber();
}

// ---- number formats of the matrix instructions -----------------------------------------------------------------------
float from_half(u16 h) {
  u32 exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                    : exponent == 0 ? float(mantissa) * 0x1p-24f
                                    : float(mantissa | 0x400) * std::ldexp(1.0f, int(exponent) - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}
float from_word(u32 w) { float f; memcpy(&f, &w, 4); return f; }
u32 to_word(float f) { u32 w; memcpy(&w, &f, 4); return w; }
float from_bfloat(u16 b) { return from_word(u32(b) << 16); }
float from_tf32(u32 w) { return from_word(w & 0xffffe000u); }

const float* half_table() {
  if (half_values.empty()) {
    half_values.resize(65536);
    for (u32 i = 0; i < 65536; ++i) half_values[i] = from_half(u16(i));
  }
  return half_values.data();
}

// D[16, 8] = A[16, k] B[k, 8] + C[16, 8] with fragments as in the PTX ISA ("Matrix fragments for mma.m16n8k*"): with
// g = lane / 4 and t = lane % 4, a 32-bit register holds `per` consecutive k of row g or g + 8 (A) or column g (B).
void mma(Fiber* lanes, int op) {
  int per = op == simt::MMA_TF32_1688 || op == simt::MMA_TF32_1684 ? 1 : op == simt::MMA_S8_16832 ? 4 : 2;
  int k = op == simt::MMA_F16_16816 || op == simt::MMA_BF16_16816 ? 16 : op == simt::MMA_S8_16832 ? 32
          : op == simt::MMA_TF32_1684 ? 4 : 8;
  const float* halves = half_table();
  float A[16][32], B[8][32];
  int step = 4 * per, count = k / step;                // registers of A per row half, and of B
  auto unpack = [&](u32 w, float* out) {
    switch (op) {
      case simt::MMA_TF32_1688: case simt::MMA_TF32_1684: out[0] = from_tf32(w); break;
      case simt::MMA_S8_16832: for (int i = 0; i < 4; ++i) out[i] = float(int8_t(w >> (8 * i))); break;
      case simt::MMA_BF16_16816: case simt::MMA_BF16_1688: out[0] = from_bfloat(u16(w)), out[1] = from_bfloat(u16(w >> 16)); break;
      default: out[0] = halves[u16(w)], out[1] = halves[w >> 16];
    }
  };
  for (int lane = 0; lane < 32; ++lane) {
    const u32* in = lanes[lane].lane->in;
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < count; ++i) {
      unpack(in[2 * i], &A[g][i * step + t * per]);
      unpack(in[2 * i + 1], &A[g + 8][i * step + t * per]);
      unpack(in[4 + i], &B[g][i * step + t * per]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    Lane& l = *lanes[lane].lane;
    int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      int row = g + 8 * (r / 2), column = 2 * t + r % 2;
      if (op == simt::MMA_S8_16832) {
        int sum = int(l.in[8 + r]);
        for (int i = 0; i < k; ++i) sum += int(A[row][i]) * int(B[column][i]);
        l.out[r] = u32(sum);
      } else {
        double sum = double(from_word(l.in[8 + r]));
        for (int i = 0; i < k; ++i) sum += double(A[row][i]) * double(B[column][i]);
        l.out[r] = to_word(float(sum));
      }
    }
  }
}

// ldmatrix: matrix m's row i is 16 bytes at the address that lane 8 m + i gives; lane l gets row l / 4, columns
// 2 (l % 4) and the next (transposed: rows 2 (l % 4) and the next of column l / 4).
uptr lane_address(const Lane& l) { return uptr(l.in[0]) | uptr(l.in[1]) << 32; }

void matrix_access(Fiber& f, u32 count, Kind kind) {
  u32 lane = f.thread % 32;
  if (lane >= 8 * count) return;
  uptr p = lane_address(*f.lane);
  u64 pc = u64(f.lane->in[14]) | u64(f.lane->in[15]) << 32;
  if (p % 16 != 0) fault("misaligned", &f, at_pc(pc), format("matrix row address %#llx is not a multiple of 16", ADDRESS(p)));
  Spot s;
  if (!find_shared(p, s)) fault("shared-out-of-bounds", &f, at_pc(pc), "the matrix row address is not in shared memory");
  access(f, reinterpret_cast<void*>(p), 16, kind, pc);
}

void ldmatrix(Fiber* lanes, bool transposed) {
  u32 count = lanes[0].lane->in[2];
  for (u32 i = 0; i < 32; ++i) matrix_access(lanes[i], count, READ);
  for (u32 m = 0; m < count; ++m)
    for (u32 l = 0; l < 32; ++l) {
      u16 pair[2];
      for (u32 i = 0; i < 2; ++i) {
        u32 row = transposed ? 2 * (l % 4) + i : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + i;
        pair[i] = reinterpret_cast<const u16*>(lane_address(*lanes[8 * m + row].lane))[column];
      }
      lanes[l].lane->out[m] = u32(pair[0]) | u32(pair[1]) << 16;
    }
}

void stmatrix(Fiber* lanes, bool transposed) {
  u32 count = lanes[0].lane->in[2];
  for (u32 i = 0; i < 32; ++i) matrix_access(lanes[i], count, WRITE);
  for (u32 m = 0; m < count; ++m)
    for (u32 l = 0; l < 32; ++l)
      for (u32 i = 0; i < 2; ++i) {
        u32 row = transposed ? 2 * (l % 4) + i : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + i;
        reinterpret_cast<u16*>(lane_address(*lanes[8 * m + row].lane))[column] = u16(lanes[l].lane->in[3 + m] >> (16 * i));
      }
}

// ---- warp collectives ------------------------------------------------------------------------------------------------
u32 reduce(int op, u32 a, u32 b) {
  switch (op) {
    case simt::REDUCE_ADD_S32: case simt::REDUCE_ADD_U32: return a + b;
    case simt::REDUCE_MIN_S32: return u32(std::min(int(a), int(b)));
    case simt::REDUCE_MAX_S32: return u32(std::max(int(a), int(b)));
    case simt::REDUCE_MIN_U32: return std::min(a, b);
    case simt::REDUCE_MAX_U32: return std::max(a, b);
    case simt::REDUCE_AND: return a & b;
    case simt::REDUCE_OR: return a | b;
    default: return a ^ b;
  }
}

void shuffle(Fiber* lanes, u32 mask, int op) {
  for (u32 m = mask; m != 0; m &= m - 1) {
    int i = __builtin_ctz(m);
    Lane& l = *lanes[i].lane;
    int width = int(l.in[3]), arg = int(l.in[2]);
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
      fault("warp-mask", &lanes[i], at(lanes[i].place), format("shuffle width %d is not a power of two up to 32", width));
    int base = i & ~(width - 1), from = i;
    if (op == simt::SHFL_IDX) from = base + (arg & (width - 1));
    else if (op == simt::SHFL_UP) from = i - arg >= base && u32(arg) < 32 ? i - arg : i;
    else if (op == simt::SHFL_DOWN) from = u32(arg) < 32 && i + arg < base + width ? i + arg : i;
    else from = (i ^ arg) < base + width && u32(arg) < 32 ? i ^ arg : i;
    if (!(mask >> from & 1))
      fault("warp-mask", &lanes[i], at(lanes[i].place), format("lane %d reads lane %d, which does not take part in %s "
            "(it has ended, does not exist, or is not in the mask)", i, from, OP_NAMES[op]));
    l.out[0] = lanes[from].lane->in[0];
    l.out[1] = lanes[from].lane->in[1];
  }
}

void run_collective(Block& b, u32 warp, u32 mask, int op, const Fiber& last) {
  Fiber* lanes = &b.fibers[warp * 32];
  for (u32 m = mask; m != 0; m &= m - 1) {
    const Fiber& f = lanes[__builtin_ctz(m)];
    if (f.op != op)
      fault("warp-mask", &last, at(last.place), format("lanes with the same mask %#x are in different collectives:\n", last.warp_mask) + census(b));
  }
  ++progress;
  meet_warp(b, warp, mask);
  if (op == simt::SYNCWARP) return;
  if (op <= simt::SHFL_XOR) return shuffle(lanes, mask, op);
  if (op >= simt::LDMATRIX) {
    if (mask != 0xffffffffu)
      fault("warp-mask", &last, at(last.place), format("%s needs all 32 lanes; %#x take part", OP_NAMES[op], mask));
    if (op == simt::LDMATRIX || op == simt::LDMATRIX_TRANS) return ldmatrix(lanes, op == simt::LDMATRIX_TRANS);
    if (op == simt::STMATRIX || op == simt::STMATRIX_TRANS) return stmatrix(lanes, op == simt::STMATRIX_TRANS);
    return mma(lanes, op);
  }
  u32 ballot = 0, total = lanes[__builtin_ctz(mask)].lane->in[0];
  bool match = true;
  const u32* first = lanes[__builtin_ctz(mask)].lane->in;
  for (u32 m = mask; m != 0; m &= m - 1) {
    const u32* in = lanes[__builtin_ctz(m)].lane->in;
    if (in[0] != 0) ballot |= m & -m;
    if (m != mask) total = reduce(op, total, in[0]);
    match = match && in[0] == first[0] && in[1] == first[1];
  }
  for (u32 m = mask; m != 0; m &= m - 1) {
    Lane& l = *lanes[__builtin_ctz(m)].lane;
    switch (op) {
      case simt::BALLOT: l.out[0] = ballot; break;
      case simt::ALL: l.out[0] = ballot == mask; break;
      case simt::ANY: l.out[0] = ballot != 0; break;
      case simt::MATCH_ALL: l.out[0] = match ? mask : 0; break;
      case simt::MATCH_ANY:
        l.out[0] = 0;
        for (u32 n = mask; n != 0; n &= n - 1) {
          const u32* in = lanes[__builtin_ctz(n)].lane->in;
          if (in[0] == l.in[0] && in[1] == l.in[1]) l.out[0] |= n & -n;
        }
        break;
      default: l.out[0] = total;
    }
  }
}

// ---- blocks --------------------------------------------------------------------------------------------------------
u64 stacks_bytes() { return launch->stack_bytes * threads_per_block; }

std::unique_ptr<Block> start_block(u64 number) {
  std::unique_ptr<Block> b;
  if (!idle_blocks.empty()) {
    b = std::move(idle_blocks.back());
    idle_blocks.pop_back();
  } else {
    b = std::make_unique<Block>();
    b->stacks = static_cast<u8*>(mmap(nullptr, stacks_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    b->dynamic = static_cast<u8*>(mmap(nullptr, launch->dynamic_shared + 2 * GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (b->stacks == MAP_FAILED || b->dynamic == MAP_FAILED) fault("out-of-memory", nullptr, "", "no memory for the fibers of a block");
    b->shadows.resize(1 + launch->variable_count);
    b->saved.resize(launch->variable_count);
    b->fibers.resize(threads_per_block);
    b->ready.resize(threads_per_block + 1);
  }
  memset(b->dynamic + GUARD, 0xff, launch->dynamic_shared);  // NaN, in case nothing checks
  u32 shape[3] = {launch->grid[0], launch->grid[1], launch->grid[2]};
  uint3 index{u32(number % shape[0]), u32(number / shape[0] % shape[1]), u32(number / (u64(shape[0]) * shape[1]))};
  b->index = index;
  b->floor = b->born = tick();
  b->alive = threads_per_block;
  b->at_barrier = b->barrier_sum = b->barrier_result = 0;
  b->warps.assign((threads_per_block + 31) / 32, Warp{0, 0, 0});
  b->head = b->tail = 0;
  b->polling.clear();
  b->unwritten.clear();
  b->named.clear();
  b->mbarriers.clear();
  for (auto& bytes : b->saved) bytes.clear();
  std::vector<u32> order(threads_per_block);
  for (u32 i = 0; i < threads_per_block; ++i) order[i] = i;
  if (launch->seed != 0) {
    std::mt19937_64 random(launch->seed + number);
    for (u32 i = threads_per_block - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  }
  for (u32 i = 0; i < threads_per_block; ++i) {
    Fiber& f = b->fibers[i];
    f.block = b.get();
    f.thread = i;
    f.time = b->born;
    f.place = Place{nullptr, "?", 0};
    f.polls_at = 0;
    f.stack_low = uptr(b->stacks) + i * launch->stack_bytes;
    f.groups = 0;
    f.copies.clear();
    f.clock.reset();
    memset(f.lanes, 0, sizeof f.lanes);
    b->warps[i / 32].exists |= 1u << (i % 32);
    f.lane = reinterpret_cast<Lane*>(f.stack_low + launch->stack_bytes - sizeof(Lane));
    prepare(f);
  }
  for (u32 i : order) make_ready(*b, i);
  ++progress;
  return b;
}

// Static shared memory has one address for all blocks: on a change of block the bytes that were in use are exchanged.
void swap_in(Block* b) {
  if (current_block == b) return;
  for (u64 v = 0; v < launch->variable_count; ++v) {
    if (checking && !touched[v]) continue;
    const SharedVariable& s = launch->variables[v];
    u8* bytes = reinterpret_cast<u8*>(s.low);
    if (current_block != nullptr && current_block->alive != 0) current_block->saved[v].assign(bytes, bytes + s.bytes);
    if (!b->saved[v].empty()) memcpy(bytes, b->saved[v].data(), s.bytes);
    else memset(bytes, 0xff, s.bytes);
  }
  current_block = b;
}

void run_block(Block& b) {
  swap_in(&b);
  for (u32 t : b.polling) make_ready(b, t);
  b.polling.clear();
  if (b.head == b.tail) return;
  Fiber& f = b.fibers[b.ready[b.head]];
  b.head = (b.head + 1) % u32(b.ready.size());
  enter(f);
#if defined(__x86_64__)
  simt_switch(&scheduler_stack_pointer, f.stack_pointer);
#else
  swapcontext(&scheduler_context, &f.context);
#endif
}

const Fiber* first_waiting(const Block& b) {
  for (const Fiber& f : b.fibers)
    if (f.state != EXITED && f.place.what != nullptr) return &f;
  return &b.fibers[0];
}

void run_grid() {
  u64 total = u64(launch->grid[0]) * launch->grid[1] * launch->grid[2], next = 0;
  u32 idle_rounds = 0;
  u64 last_progress = 0;
  while (next < total || !alive.empty()) {
    if (next < total && (alive.empty() || alive.size() < launch->max_blocks)) alive.push_back(start_block(next++));
    // A round: each block runs until it ends or polls. Blocks that wait for nothing but polling get here again.
    for (size_t i = 0; i < alive.size();) {
      Block& b = *alive[i];
      run_block(b);
      if (b.alive == 0) {
        require_written(b);
        idle_blocks.push_back(std::move(alive[i]));
        alive.erase(alive.begin() + long(i));
        continue;
      }
      if (b.polling.empty()) {
        const Fiber* f = first_waiting(b);
        bool barrier = b.at_barrier != 0;
        for (const Fiber& g : b.fibers)
          if (g.state == AT_BARRIER) { f = &g; break; }
        fault(barrier ? "barrier-divergence" : "deadlock", f, at(f->place),
              (barrier ? "not all threads of the block reach this barrier:\n" : "no thread of the block can go on:\n") + census(b));
      }
      ++i;
    }
    idle_rounds = progress == last_progress ? idle_rounds + 1 : 0;
    last_progress = progress;
    if (idle_rounds > 20000 && !alive.empty() && (next == total || alive.size() >= launch->max_blocks)) {
      const Fiber* f = &alive[0]->fibers[alive[0]->polling[0]];
      fault("deadlock", f, at_pc(f->polls_at), format("%zu blocks are alive and every thread that is not blocked polls memory that nobody changes; block (%u, %u, %u):\n",
            alive.size(), alive[0]->index.x, alive[0]->index.y, alive[0]->index.z) + census(*alive[0]));
    }
  }
}

// ---- signals: what the checks did not catch (unchecked runs, endless loops) --------------------------------------------
void on_signal(int number, siginfo_t* info, void* context) {
  u64 pc = 0;
#if defined(__x86_64__)
  pc = u64(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  pc = static_cast<ucontext_t*>(context)->uc_mcontext.pc;
#endif
  if (number == SIGALRM)
    fault("timeout", current, at_pc(pc), format("still running after %g s", launch->timeout) +
          (current_block != nullptr ? "\n" + census(*current_block) : ""));
  if (number == SIGTRAP) fault("trap", current, at_pc(pc), "__brkpt() outside a debugger");
  fault(number == SIGFPE ? "division-by-zero" : "memory-access", current, at_pc(pc),
        format("%s at address %p", number == SIGFPE ? "integer division by zero" : "the processor refused an access", info->si_addr));
}

int image_of(dl_phdr_info* info, size_t, void* self) {
  uptr low = ~uptr(0), high = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    uptr start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    low = std::min(low, start);
    high = std::max(high, start + info->dlpi_phdr[i].p_memsz);
  }
  if (uptr(self) < low || uptr(self) >= high) return 0;
  image_low = low;
  image_high = high;
  return 1;
}

void release(std::vector<std::unique_ptr<Block>>& blocks) {
  for (auto& b : blocks) {
    munmap(b->stacks, stacks_bytes());
    munmap(b->dynamic, launch->dynamic_shared + 2 * GUARD);
  }
  blocks.clear();
}

Fiber& self() { return *current; }
u64 caller_pc(void* return_address) { return u64(return_address) - 1; }

}  // namespace

#define PC caller_pc(__builtin_return_address(0))
#define EXPORT extern "C" __attribute__((visibility("hidden")))

// ---- entry from Python ---------------------------------------------------------------------------------------------
extern "C" __attribute__((visibility("default"))) int simt_launch(const Launch* l) {
  launch = l;
  threads_per_block = l->block[0] * l->block[1] * l->block[2];
  checking = l->check;
  granule_shift = 2;
  now = 0;
  progress = 0;
  failed = false;
  current = nullptr;
  current_block = nullptr;
  last_region = Region{1, 0, 0, 0};
  stack_size = l->stack_bytes;
  dl_iterate_phdr(image_of, reinterpret_cast<void*>(&image_of));
  shared_low = ~uptr(0), shared_high = 0;
  for (u64 i = 0; i < l->variable_count; ++i) {
    shared_low = std::min(shared_low, uptr(l->variables[i].low));
    shared_high = std::max(shared_high, uptr(l->variables[i].low + l->variables[i].bytes + 64));
  }
  if (l->variable_count == 0) shared_low = shared_high = 0;
  shared_low &= ~uptr(63);
  line_variable.assign((shared_high - shared_low + 63) / 64 + 1, 0);
  for (u64 i = 0; i < l->variable_count; ++i)
    for (uptr p = uptr(l->variables[i].low); p < l->variables[i].low + l->variables[i].bytes + 64; p += 64)
      line_variable[(p - shared_low) >> 6] = u16(i + 1);
  touched.assign(l->variable_count, 0);

  static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGALRM};
  struct sigaction action = {}, old[6];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  stack_t alternative = {signal_stack, 0, sizeof signal_stack}, old_stack;
  sigaltstack(&alternative, &old_stack);
  for (int i = 0; i < 6; ++i) sigaction(signals[i], &action, &old[i]);
  itimerval timer = {{0, 0}, {long(l->timeout), long((l->timeout - double(long(l->timeout))) * 1e6)}}, old_timer;
  setitimer(ITIMER_REAL, &timer, &old_timer);
#if defined(__x86_64__)
  u32 control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);                       // flush denormals to zero, as NVRTC's -ftz=true
#endif
  if (sigsetjmp(escape, 1) == 0) run_grid();
#if defined(__x86_64__)
  _mm_setcsr(control);
#endif
  setitimer(ITIMER_REAL, &old_timer, nullptr);
  for (int i = 0; i < 6; ++i) sigaction(signals[i], &old[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  fflush(stdout);
  release(alive);
  release(idle_blocks);
  current = nullptr;
  current_block = nullptr;
  return failed;
}

// ---- the functions that simt.h declares ------------------------------------------------------------------------------
EXPORT __attribute__((used)) uint3 simt_thread_idx() { return coordinates(self().thread, launch->block); }
EXPORT __attribute__((used)) uint3 simt_block_idx() { return self().block->index; }
EXPORT __attribute__((used)) uint3 simt_block_dim() { return uint3{launch->block[0], launch->block[1], launch->block[2]}; }
EXPORT __attribute__((used)) uint3 simt_grid_dim() { return uint3{launch->grid[0], launch->grid[1], launch->grid[2]}; }
EXPORT u8* simt_dynamic_shared() { return self().block->dynamic + GUARD; }
EXPORT Lane* simt_lane() { return self().lane; }
EXPORT u32 simt_active_mask() {
  const Warp& w = self().block->warps[self().thread / 32];
  return w.exists & ~w.exited;
}

EXPORT void simt_collective(u32 mask, int op, const char* file, int line) {
  Fiber& f = self();
  Block& b = *f.block;
  u32 warp = f.thread / 32, lane = f.thread % 32;
  f.place = Place{OP_NAMES[op], file, line};
  f.op = u8(op);
  f.warp_mask = mask;
  Warp& w = b.warps[warp];
  if (!(mask >> lane & 1))
    fault("warp-mask", &f, at(f.place), format("lane %u calls %s with mask %#x, which does not name it", lane, OP_NAMES[op], mask));
  if (op >= simt::LDMATRIX) {
    u64 pc = PC;
    f.lane->in[14] = u32(pc), f.lane->in[15] = u32(pc >> 32);
  }
  u32 needed = mask & w.exists & ~w.exited;
  bool complete = true;
  for (u32 m = needed; m != 0; m &= m - 1) {
    u32 i = u32(__builtin_ctz(m));
    const Fiber& other = b.fibers[warp * 32 + i];
    if (i == lane) continue;
    if (other.state != IN_WARP) { complete = false; continue; }
    if (other.warp_mask != mask && (other.warp_mask >> lane & 1))
      fault("warp-mask", &f, at(f.place), format("lane %u calls %s with mask %#x, but lane %u waits for it in %s with mask %#x at ", lane,
            OP_NAMES[op], mask, i, OP_NAMES[other.op], other.warp_mask) + at(other.place));
    if (other.warp_mask != mask) complete = false;
  }
  f.state = IN_WARP;
  if (!complete) return switch_away(f);
  run_collective(b, warp, needed, op, f);
  for (u32 m = needed; m != 0; m &= m - 1) {
    u32 i = u32(__builtin_ctz(m));
    if (i != lane) make_ready(b, warp * 32 + i);
  }
  f.state = READY;
}

EXPORT int simt_barrier(int predicate, int reduction, const char* what, const char* file, int line) {
  Fiber& f = self();
  Block& b = *f.block;
  f.place = Place{what, file, line};
  f.state = AT_BARRIER;
  ++b.at_barrier;
  b.barrier_sum += predicate != 0;
  check_barrier(b, f);
  switch_away(f);
  u32 sum = b.barrier_result;
  return reduction == 1 ? int(sum) : reduction == 2 ? sum == b.fibers.size() : sum != 0;
}

EXPORT void simt_named_barrier(int id, int threads, int wait, const char* file, int line) {
  Fiber& f = self();
  Block& b = *f.block;
  f.place = Place{wait ? "bar.sync" : "bar.arrive", file, line};
  if (id < 0 || id > 15 || threads <= 0 || threads % 32 != 0)
    fault("named-barrier", &f, at(f.place), format("barrier %d for %d threads: the id is 0 to 15, the count a multiple of 32", id, threads));
  Named& n = b.named[id];
  if (n.arrived == 0) n.count = u32(threads);
  if (n.count != u32(threads))
    fault("named-barrier", &f, at(f.place), format("barrier %d is used with %u and with %d threads at once", id, n.count, threads));
  ++n.arrived;
  n.threads.push_back(f.thread);
  if (wait) n.waiting.push_back(f.thread), f.state = AT_NAMED;
  if (n.arrived == n.count) {
    std::vector<u32> met, waiting;
    met.swap(n.threads), waiting.swap(n.waiting);
    n.arrived = 0;
    ++progress;
    meet(b, met);
    for (u32 t : waiting) make_ready(b, t);
  }
  if (wait) switch_away(f);
}

EXPORT u64 simt_load(const void* p, u32 bytes, int polls) {
  u64 pc = PC;
  if (polls) poll(pc);
  access(self(), p, bytes, READ, pc);
  u64 bits = 0;
  memcpy(&bits, p, bytes);
  return bits;
}
EXPORT void simt_store(void* p, u32 bytes, u64 bits) {
  access(self(), p, bytes, WRITE, PC);
  memcpy(p, &bits, bytes);
}
EXPORT u64 simt_atomic_begin(void* p, u32 bytes) {
  u64 pc = PC;
  if (uptr(p) % bytes != 0) fault("misaligned", &self(), at_pc(pc), format("atomic of %u bytes at %p", bytes, p));
  u64 changes = progress;
  access(self(), p, bytes, ATOMIC_UPDATE, pc);
  progress = changes;
  u64 bits = 0;
  memcpy(&bits, p, bytes);
  return bits;
}
EXPORT void simt_atomic_end(void* p, u32 bytes, u64 before, u64 after) {
  memcpy(p, &after, bytes);
  if (before == after) poll(PC);
  else ++progress;
}
EXPORT void simt_yield() { poll(PC); }
EXPORT u64 simt_clock(int nanoseconds) {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  (void)nanoseconds;
  return u64(t.tv_sec) * 1000000000ull + u64(t.tv_nsec);
}
EXPORT void simt_trap(const char* what, const char* file, int line) {
  fault("trap", &self(), format("%s:%d", file, line), what);
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------
namespace {
Copy begin_copy(Fiber& f, void* to, const void* from, u32 bytes, u32 source_bytes, u64 pc) {
  if (uptr(to) % std::min(bytes, 16u) != 0 || (source_bytes != 0 && uptr(from) % std::min(bytes, 16u) != 0))
    fault("misaligned", &f, at_pc(pc), format("asynchronous copy of %u bytes from %p to %p", bytes, from, to));
  if (!is_shared(to)) fault("shared-out-of-bounds", &f, at_pc(pc), "the destination of the asynchronous copy is not in shared memory");
  if (source_bytes != 0) access(f, from, source_bytes, READ, pc);
  access(f, to, bytes, ASYNC_WRITE, pc);
  return Copy{to, from, bytes, source_bytes, f.thread, f.groups, u32(pc - image_low), f.time};
}
MBarrier& mbarrier(Fiber& f, void* bar, const Place& place) {
  f.place = place;
  auto found = f.block->mbarriers.find(uptr(bar));
  if (found == f.block->mbarriers.end()) fault("mbarrier", &f, at(place), "the mbarrier has not been initialised");
  return found->second;
}
void complete_phase(Block& b, MBarrier& m) {
  (void)b;
  if (m.pending != 0 || m.bytes != 0) return;
  m.done = m.clock;
  m.phase ^= 1;
  m.pending = m.count;
  ++progress;
}
void arrive(Fiber& f, MBarrier& m, u32 count, const Place& place) {
  if (m.pending < count) fault("mbarrier", &f, at(place), format("%u arrivals, but the phase expects only %u more", count, m.pending));
  Clock c = full_clock(f);
  (*c)[f.thread] = f.time = tick();
  join(m.clock, *c);
  m.pending -= count;
  ++progress;
}
}  // namespace

EXPORT void simt_cp_async(void* to, const void* from, u32 bytes, u32 source_bytes) {
  Fiber& f = self();
  f.copies.push_back(begin_copy(f, to, from, bytes, source_bytes, PC));
}
EXPORT void simt_cp_async_commit() { ++self().groups; }
EXPORT void simt_cp_async_wait(int left) {      // left < 0: everything, also what was not committed
  Fiber& f = self();
  size_t kept = 0;
  for (const Copy& c : f.copies) {
    if (left >= 0 && c.group + u32(left) >= f.groups) f.copies[kept++] = c;
    else land(f, c, f.time);
  }
  f.copies.resize(kept);
}
EXPORT void simt_mbarrier_init(void* bar, u32 count, const char* file, int line) {
  Fiber& f = self();
  f.place = Place{"mbarrier.init", file, line};
  access(f, bar, 8, WRITE, PC);
  MBarrier m{count, count, 0, 0, {}, {}, {}};
  m.clock.assign(threads_per_block, 0);
  m.done.assign(threads_per_block, 0);
  f.block->mbarriers[uptr(bar)] = m;
}
EXPORT u64 simt_mbarrier_arrive(void* bar, u32 count, u32 expect_bytes, int is_arrival, const char* file, int line) {
  Fiber& f = self();
  Place place{"mbarrier.arrive", file, line};
  MBarrier& m = mbarrier(f, bar, place);
  u64 phase = m.phase;
  m.bytes += expect_bytes;
  if (is_arrival) arrive(f, m, count, place);
  complete_phase(*f.block, m);
  return phase;
}
EXPORT void simt_cp_async_mbarrier_arrive(void* bar, int noinc) {
  Fiber& f = self();
  Place place{"cp.async.mbarrier.arrive", "?", 0};
  MBarrier& m = mbarrier(f, bar, place);
  for (const Copy& c : f.copies) land(f, c, f.time);    // the arrival follows them; nobody can see the bytes before it
  f.copies.clear();
  if (!noinc) ++m.pending;
  arrive(f, m, 1, place);
  complete_phase(*f.block, m);
}
EXPORT int simt_mbarrier_test(void* bar, u32 parity, int wait, const char* file, int line) {
  Fiber& f = self();
  Place place{"mbarrier.try_wait", file, line};
  u64 pc = PC;
  for (;;) {
    MBarrier& m = mbarrier(f, bar, place);
    for (const Copy& c : m.copies) {            // bulk copies land when somebody looks
      land(f, c, c.time);
      m.clock[c.thread] = std::max(m.clock[c.thread], c.time + 1);
      m.bytes -= c.bytes;
    }
    if (!m.copies.empty()) m.copies.clear(), complete_phase(*f.block, m);
    if (m.phase != (parity & 1)) {              // the phase with this parity has completed
      Clock c = full_clock(f);
      join(*c, m.done);
      f.time = tick();
      f.clock = c;
      return 1;
    }
    poll(pc);
    if (!wait) return 0;
  }
}
EXPORT void simt_bulk_copy(void* to, const void* from, u32 bytes, void* bar, const char* file, int line) {
  Fiber& f = self();
  u64 pc = PC;
  Place place{"cp.async.bulk", file, line};
  if (bytes % 16 != 0) fault("misaligned", &f, at(place), format("a bulk copy of %u bytes: not a multiple of 16", bytes));
  MBarrier& m = mbarrier(f, bar, place);
  m.copies.push_back(begin_copy(f, to, from, bytes, bytes, pc));
  f.time = tick();                              // what the thread does next is not part of what the copy releases
}

// ---- what -fsanitize=thread calls ------------------------------------------------------------------------------------
#define HOOK(name, bytes, kind)                                                                                   \
  EXPORT void name(const void* p) {                                                                               \
    if (uptr(p) - stack_low >= stack_size) access(self(), p, bytes, kind, PC);                                    \
  }
#define VOLATILE_HOOK(name, bytes)                                                                                \
  EXPORT void name(const void* p) {                                                                               \
    if (uptr(p) - stack_low < stack_size) return;                                                                 \
    u64 pc = PC;                                                                                                  \
    poll(pc);                                                                                                 \
    access(self(), p, bytes, READ, pc);                                                                           \
  }
#define HOOKS(n)                                                                                                  \
  HOOK(__tsan_read##n, n, READ)                                                                                   \
  HOOK(__tsan_write##n, n, WRITE)                                                                                 \
  HOOK(__tsan_unaligned_read##n, n, READ)                                                                         \
  HOOK(__tsan_unaligned_write##n, n, WRITE)                                                                       \
  VOLATILE_HOOK(__tsan_volatile_read##n, n)                                                                       \
  HOOK(__tsan_volatile_write##n, n, WRITE)                                                                        \
  VOLATILE_HOOK(__tsan_unaligned_volatile_read##n, n)                                                             \
  HOOK(__tsan_unaligned_volatile_write##n, n, WRITE)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
EXPORT void __tsan_read_range(const void* p, u64 bytes) {
  if (uptr(p) - stack_low >= stack_size) access(self(), p, u32(bytes), READ, PC);
}
EXPORT void __tsan_write_range(const void* p, u64 bytes) {
  if (uptr(p) - stack_low >= stack_size) access(self(), p, u32(bytes), WRITE, PC);
}
// g++ guards the initialisation of a `static` (shared) array of a class type even if there is nothing to initialise; it
// is told that this has been done.
EXPORT u8 __tsan_atomic8_load(const volatile u8*, int) { return 1; }
EXPORT int __cxa_guard_acquire(long long*) { return 0; }
EXPORT void __cxa_guard_release(long long*) {}
EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_vptr_update(void*, void*) {}

// ---- what -fsanitize=undefined calls: every handler's data begins with the place in the source -------------------------
namespace {
struct UbPlace { const char* file; u32 line, column; };
[[noreturn]] void undefined(const void* data, const char* what, const std::string& detail = "") {
  const UbPlace* p = static_cast<const UbPlace*>(data);
  fault("undefined-behaviour", current, format("%s:%u", p->file, p->line), what + detail);
}
struct UbTypeMismatch { UbPlace place; const struct UbType { u16 kind, info; char name[1]; }* type; u8 log_alignment, check; };
}  // namespace
#define UB(name, what) EXPORT void __ubsan_handle_##name(void* data) { undefined(data, what); }
#define UBS(name, what) UB(name, what) UB(name##_abort, what)
EXPORT void __ubsan_handle_type_mismatch_v1_abort(UbTypeMismatch* data, uptr p) {
  u64 alignment = 1ull << data->log_alignment;
  if (p == 0) fault("global-out-of-bounds", current, format("%s:%u", data->place.file, data->place.line), "a null pointer is used");
  if (p % alignment != 0)
    fault("misaligned", current, format("%s:%u", data->place.file, data->place.line),
          format("an address of type %s must be a multiple of %llu, but %#llx is not", data->type->name, ADDRESS(alignment), ADDRESS(p)));
  fault("undefined-behaviour", current, format("%s:%u", data->place.file, data->place.line), format("the object is too small for type %s", data->type->name));
}
EXPORT void __ubsan_handle_type_mismatch_v1(UbTypeMismatch* data, uptr p) { __ubsan_handle_type_mismatch_v1_abort(data, p); }
EXPORT void __ubsan_handle_out_of_bounds_abort(void* data, uptr index) {
  undefined(data, "array index out of bounds", format(": %lld", (long long)index));
}
EXPORT void __ubsan_handle_out_of_bounds(void* data, uptr index) { __ubsan_handle_out_of_bounds_abort(data, index); }
UBS(add_overflow, "signed integer overflow in an addition")
UBS(sub_overflow, "signed integer overflow in a subtraction")
UBS(mul_overflow, "signed integer overflow in a multiplication")
UBS(negate_overflow, "signed integer overflow in a negation")
UBS(divrem_overflow, "integer division by zero, or overflow in a division")
UBS(shift_out_of_bounds, "shift by a negative number or by the width of the type or more")
UBS(pointer_overflow, "pointer arithmetic overflows")
UBS(load_invalid_value, "a bool or enum holds a value that its type does not have")
UBS(vla_bound_not_positive, "array of a size that is not positive")
UBS(nonnull_arg, "null passed where the declaration forbids it")
UBS(float_cast_overflow, "a float does not fit the integer type that it is converted to")
UBS(invalid_builtin, "__builtin_clz or __builtin_ctz of zero")
UB(builtin_unreachable, "code that was declared unreachable is reached")
UB(missing_return, "the end of a function that returns a value is reached")
