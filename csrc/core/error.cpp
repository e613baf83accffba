// SPDX-License-Identifier: Apache-2.0
// Formatting of error messages.
#include "core/error.h"

#include <cstdarg>
#include <cstdio>
#include <string>

namespace vk {
namespace {

std::string format_message(const char* format, va_list arguments) {
  constexpr int kMaxMessage = 1024;  // longer messages are cut; ours are one sentence
  char message[kMaxMessage];
  std::vsnprintf(message, sizeof message, format, arguments);
  return message;
}

}  // namespace

void raise_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string message = format_message(format, arguments);
  va_end(arguments);
  throw Error(message);
}

void raise_value_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string message = format_message(format, arguments);
  va_end(arguments);
  throw ValueError(message);
}

}  // namespace vk
