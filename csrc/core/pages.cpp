// SPDX-License-Identifier: Apache-2.0
#include "core/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vk {

void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kSmallest = int64_t{4} << 20;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kSmallest) return;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Where the system refuses, nothing is lost.
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vk
