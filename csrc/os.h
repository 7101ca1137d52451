#pragma once

// What blockswap asks of the operating system, and nothing else does: porting it means another
// os.cpp. Common rules: addresses and sizes are multiples of page_bytes() unless stated; bytes > 0;
// nothing throws; a function called try_* or returning bool reports failure, advice that is not
// taken changes speed only. All are safe to call from any thread.

#include <cstdint>

namespace blockswap::os {

// The size of a huge page, and the alignment that lets the system use one.
constexpr int64_t kHugePageBytes = int64_t{2} << 20;

// The smallest unit of memory that the system hands out; a power of two, constant for the process.
int64_t page_bytes();

// Reserves private memory that reads as zeros. No physical page is taken until it is written.
// pre: alignment is a power of two >= page_bytes().
// post: exactly `bytes` stay reserved, from a multiple of `alignment`; nullptr when refused, errno
// says why.
void* try_reserve(int64_t bytes, int64_t alignment);

// The same of addresses alone, which may exceed the memory there is: touching them faults until
// allow().
void* try_reserve_addresses(int64_t bytes, int64_t alignment);

// Ends a reservation. pre: exactly the range of one try_reserve, which nobody uses any more.
void unreserve(void* address, int64_t bytes);

// Asks for huge pages where a whole aligned one lies inside the range. Memory taken never passes
// the range.
void advise_huge(void* address, int64_t bytes);

// Makes no more huge pages in the range; those that are there stay. Without it the system may fill
// the gaps of a partly discarded range in again, behind our back.
void advise_small(void* address, int64_t bytes);

// Takes the physical pages of the range now, as a write would; bytes already there keep their
// values, also while other threads write them. False: not supported or refused, nothing changed
// that matters, the first write will take them.
bool populate(void* address, int64_t bytes);

// Gives the physical pages of the range back. pre: no device holds them registered, nobody needs
// the bytes. post: the range reads as zeros and may be written again.
void discard(void* address, int64_t bytes);

// Takes the right to touch the range away, and its physical pages: any access faults until allow(),
// after which it reads as zeros. False: refused. pre: part of one reservation.
bool forbid(void* address, int64_t bytes);
bool allow(void* address, int64_t bytes);

// How much of the range has physical pages; 0 when the system cannot tell.
int64_t resident_bytes(const void* address, int64_t bytes);

// Passes what malloc keeps of freed memory back to the system.
void return_freed_memory();

// Cores that this process may use: affinity and the container's quota, at least 1.
int num_usable_cores();

// True once exit() has begun: the device's driver may be gone, so destructors leave it alone.
// Reliable only after watch_exit() was called when the driver was already up, since handlers run
// last in, first out.
bool process_is_exiting();
void watch_exit();

}  // namespace blockswap::os
