// SPDX-License-Identifier: Apache-2.0
// Large pages for large memory.
#pragma once

#include <cstdint>

namespace vk {

// Asks for large pages in memory that was just made and is still to be written: at 4 KiB, every page is zeroed and
// mapped by itself when it is first touched, and a scan waits for a translation at each. A hint; small memory is left
// as it is.
void ask_for_large_pages(void* data, int64_t bytes);

}  // namespace vk
