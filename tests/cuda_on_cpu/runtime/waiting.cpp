// How threads wait: for each other at barriers of blocks and clusters and in collectives of warps,
// and for asynchronous copies.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "runtime/engine.h"

namespace cuda_on_cpu {
namespace {

// Leaves the running thread; the scheduler comes back once its lane is ready again.
void suspend() { switch_context(self->context, engine.scheduler); }

void move_to(unsigned& set) {
  const unsigned bit = 1u << self->lane;
  self->warp->ready &= ~bit;
  set |= bit;
}

void release(Block& block, unsigned Warp::* set) {
  block.priority = engine.random();
  for (Warp& warp : block.warps) warp.make_ready(std::exchange(warp.*set, 0));
}

// Completes the collective that a lane waits in, if every lane of its mask is there.
void try_collective(Warp& warp, const Thread& lane) {
  const unsigned members = lane.mask & ~warp.exited;
  if ((warp.in_collective & members) != members) return;
  const auto each_member = [&](auto&& visit) {
    for (Thread& t : warp.lanes) {
      if (members >> t.lane & 1) visit(t);
    }
  };
  unsigned ballot = 0;
  each_member([&](Thread& t) {
    if (t.collective != lane.collective || t.mask != lane.mask) {
      fail("lanes of a warp disagree: %s with mask %08x beside %s with mask %08x", t.collective,
           t.mask, lane.collective, lane.mask);
    }
    ballot |= static_cast<unsigned>(t.value != 0) << t.lane;
  });
  each_member([&](Thread& t) {
    const bool there = members >> (t.source % kWarp) & 1;  // CUDA: undefined where it is not
    t.result = t.source == kBallot ? ballot : there ? warp.lanes[t.source].value : ~uint64_t(0);
  });
  ++engine.time;
  each_member([](Thread& t) { t.last_collective = engine.time; });
  warp.in_collective &= ~members;
  warp.make_ready(members);
}

}  // namespace

void fail(const char* format, ...) {
  char what[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  const uint3 b = self->warp->block->index, t = self->index;
  std::snprintf(engine.failure, sizeof engine.failure,
                "block (%u, %u, %u), thread (%u, %u, %u): %s", b.x, b.y, b.z, t.x, t.y, t.z, what);
  suspend();  // the scheduler gives up the launch, this thread included
  std::abort();
}

void exit_thread() {
  Warp& warp = *self->warp;
  Block& block = *warp.block;
  move_to(warp.exited);
  for (Thread& t : warp.lanes) {
    if (warp.in_collective >> t.lane & 1) try_collective(warp, t);
  }
  if (++block.exited == block.threads) {
    check_exit(block);
  }
  suspend();
  std::abort();
}

unsigned block_barrier(const char* name, bool predicate) {
  Block& block = *self->warp->block;
  if (block.arrived > 0 && block.barrier != name) {
    fail("%s while others of the block wait at %s", name, block.barrier);
  }
  block.barrier = name;
  block.predicates += predicate;
  move_to(self->warp->at_block_barrier);
  if (++block.arrived == block.threads) {
    block.result = std::exchange(block.predicates, 0);
    block.arrived = 0;
    block.last_barrier = ++engine.time;
    release(block, &Warp::at_block_barrier);
  }
  suspend();
  return block.result;
}

uint64_t warp_collective(const char* name, unsigned mask, uint64_t value, unsigned source) {
  Warp& warp = *self->warp;
  if (!(mask >> self->lane & 1)) fail("%s: the mask %08x lacks the calling lane", name, mask);
  self->collective = name;
  self->mask = mask & ~0u >> (kWarp - warp.lanes.size());
  self->value = value;
  self->source = source;
  move_to(warp.in_collective);
  try_collective(warp, *self);
  suspend();
  return self->result;
}

void cluster_arrive() {
  if (self->cluster_arrivals > self->cluster_waits) fail("arrives twice at the cluster's barrier");
  ++self->cluster_arrivals;
  if (++engine.cluster_arrived < engine.blocks.size() * self->warp->block->threads) return;
  engine.cluster_arrived = 0;
  ++engine.cluster_barriers;
  ++engine.time;
  for (Block& block : engine.blocks) release(block, &Warp::at_cluster_barrier);
}

void cluster_wait() {
  if (self->cluster_arrivals == self->cluster_waits) {
    fail("waits at the cluster's barrier without having arrived");
  }
  if (engine.cluster_barriers < self->cluster_arrivals) {
    move_to(self->warp->at_cluster_barrier);
    suspend();
  }
  ++self->cluster_waits;
}

unsigned lane() { return self->lane; }
unsigned rank_in_cluster() { return self->warp->block->rank; }
unsigned blocks_in_cluster() { return static_cast<unsigned>(engine.blocks.size()); }
unsigned char* shared_memory() { return self->warp->block->shared_memory; }

unsigned char* shared_memory_of(const void* mine, int rank) {
  const auto offset = static_cast<const unsigned char*>(mine) - self->warp->block->shared_memory;
  if (offset < 0 || static_cast<size_t>(offset) > engine.shape.shared_bytes) {
    fail("map_shared_rank of an address that is not in this block's shared memory");
  }
  if (rank < 0 || rank >= static_cast<int>(engine.blocks.size())) {
    fail("map_shared_rank of rank %d in a cluster of %zu", rank, engine.blocks.size());
  }
  return engine.blocks[rank].shared_memory + offset;
}

void copy_later(void* shared, const void* global, size_t bytes, size_t zeros) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("asynchronous copy of %zu bytes", bytes);
  if (zeros > bytes) fail("asynchronous copy of %zu bytes, %zu of them 0", bytes, zeros);
  for (const void* p : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned asynchronous copy");
  }
  std::memset(shared, kPoison, bytes);
  self->copies.push_back({shared, global, bytes, zeros, self->commits});
}

void commit_copies() { ++self->commits; }

void wait_for_copies(size_t commits_not_waited_for) {
  std::erase_if(self->copies, [&](const AsyncCopy& copy) {
    if (copy.commit + commits_not_waited_for >= self->commits) return false;
    check_access(copy.from, copy.bytes - copy.zeros, false);
    check_access(copy.to, copy.bytes, true);
    std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
    std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
    return true;
  });
}

}  // namespace cuda_on_cpu
