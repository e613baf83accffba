// SPDX-License-Identifier: Apache-2.0
// The one exception type of the native code, and the check that throws it with a formatted message.
#pragma once

#include <stdexcept>

namespace vk {

// Becomes `vlmkernels._cpu.Error` (a RuntimeError) at the binding; _native.py adds the op's name.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A value inside a tensor that the caller got wrong; becomes a ValueError.
class ValueError : public Error {
 public:
  using Error::Error;
};

// Out of line, so that a file compiled for one instruction set gets no formatting code of its own.
[[noreturn]] void raise_error(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void raise_value_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace vk

// VK_CHECK(rows >= 0, "rows is %lld, expected at least 0", (long long)rows);
#define VK_CHECK(condition, ...)                      \
  do {                                                \
    if (!(condition)) ::vk::raise_error(__VA_ARGS__); \
  } while (false)
