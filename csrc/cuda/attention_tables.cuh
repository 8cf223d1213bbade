// Where the entries of codebooks lie in shared memory, so that lookups are free of bank conflicts; attention_mma.cuh
// says why. A table is pages of 64 KiB with a code's row every 256 bytes, so that an address is (page, code, place in
// the row): one PRMT of a word of codes and the lane's place.
//
// A narrow table holds every entry once, as the codebook does, for GPUs with less shared memory: lanes on the same
// banks then wait for each other, up to four times as long.
#pragma once

#include "../common/pq_layout.h"

namespace million {
namespace mma {

constexpr int kPage = 1 << 16, kRow = 256;

// One group of steps that rotate among themselves.
struct Group {
  int first, width;  // steps
};

// The group of a step.
constexpr Group group_of(int steps, int step) {
  const int width = rotation_width(steps, step);
  return {step / width * width, width};
}

// Keys of d channels a subspace. A group holds subspaces 4 first .. 4 (first + width) - 1 in order, `replicas` times.
template <int D, int d, bool Narrow>
struct KeyTable {
  static constexpr int kSteps = D / d / 4;
  static constexpr int run(int width) { return width * 8 * d; }  // bytes of one replica
  static constexpr int replicas(int width) { return Narrow || run(width) >= 128 ? 1 : 128 / run(width); }
  // Where a row of the codebook is a row of the table, the table is the codebook, `kCopies` times: copy i in page i,
  // moved on by i replicas, so that the same entry lies on other banks.
  static constexpr bool kWhole = 2 * D == kRow;
  static constexpr int kCopies = replicas(4), kMove = run(4);
  static constexpr int bytes(int width) { return run(width) * replicas(width); }
  static constexpr int offset(int step) {  // of a step's group in a row
    const int first = group_of(kSteps, step).first;
    int at = kWhole ? first * 8 * d : 0;
    for (int s = kWhole ? first : 0; s < first; s += rotation_width(kSteps, s)) at += bytes(rotation_width(kSteps, s));
    return at;
  }
  static constexpr int kRowBytes = kWhole ? kRow : offset(kSteps - 1) + bytes(rotation_width(kSteps, kSteps - 1));
  static constexpr int kPages = kWhole ? kCopies : (kRowBytes + kRow - 1) / kRow;
  static constexpr int kBytes = kPages * kPage + (kWhole ? (kCopies - 1) * kMove : 0);

  // The lane's place in a group of this width at step `x` of the group.
  static __device__ uint32_t lane_place(int width, int x, int n, int c) {
    if (kWhole) return n / 4 % kCopies * (kPage + kMove) + (x ^ (n & 3)) * 8 * d + c * 2 * d;
    return (n / width % replicas(width)) * run(width) + (x ^ (n & (width - 1))) * 8 * d + c * 2 * d;
  }

  // A column whose place is the same entry's in the first copy.
  static __device__ int in_first(int n) { return n & 3; }

  // Byte of the codebook's row that belongs at byte `at` of a table row.
  static __device__ int source(int at) {
    int from = 0;
    for (int s = 0; s < kSteps;) {
      const int width = rotation_width(kSteps, s);
      if (at < bytes(width)) return from + at % run(width);
      at -= bytes(width), from += run(width), s += width;
    }
    return 0;
  }
};

// Values. A group holds subspaces 8 first .. 8 (first + width) - 1 in lines, one line for the values of n that are
// served together; a line of 128 bytes holds its entries as often as they fit.
template <int D, int d, bool Narrow>
struct ValueTable {
  static constexpr int kSteps = D / d / 8;
  static constexpr int kTogether = 16 / d, kLines = 8 / kTogether;

  static constexpr int run(int width) { return 32 * width; }  // bytes of a line's entries
  static constexpr int line(int width) { return Narrow ? run(width) : 128; }
  static constexpr int bytes(int width) { return kLines * line(width); }
  static constexpr bool kWhole = 2 * D == kRow && run(rotation_width(kSteps, 0)) == line(rotation_width(kSteps, 0));
  static constexpr int kCopies = 1, kMove = 0;
  static constexpr int offset(int step) {
    int at = 0;
    for (int s = 0; s < group_of(kSteps, step).first; s += rotation_width(kSteps, s))
      at += bytes(rotation_width(kSteps, s));
    return at;
  }
  static constexpr int kRowBytes = offset(kSteps - 1) + bytes(rotation_width(kSteps, kSteps - 1));
  static constexpr int kPages = (kRowBytes + kRow - 1) / kRow;
  static constexpr int kBytes = kPages * kPage;

  static __device__ uint32_t lane_place(int width, int x, int n, int c) {
    const int replica = Narrow ? 0 : c / width;
    const int at =
        n / kTogether * line(width) + replica * run(width) + (n % kTogether * width + (x ^ (c & (width - 1)))) * 2 * d;
    return at / kRow * kPage + at % kRow;
  }
  static __device__ int source(int at) {
    int from = 0;
    for (int s = 0; s < kSteps;) {
      const int width = rotation_width(kSteps, s);
      if (at < bytes(width)) return from + at / line(width) * run(width) + at % line(width) % run(width);
      at -= bytes(width), from += kLines * run(width), s += width;
    }
    return 0;
  }
};

}  // namespace mma
}  // namespace million
