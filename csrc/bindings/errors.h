// SPDX-License-Identifier: Apache-2.0
// The translation of vk::Error, the same in every extension module.
#pragma once

#include <pybind11/pybind11.h>

#include "core/error.h"

namespace vk {

// Local to the module: a translator in pybind11's shared state could be asked about another library's exceptions.
inline void bind_errors(pybind11::module_& module) {
  pybind11::register_local_exception<Error>(module, "Error", PyExc_RuntimeError);
  pybind11::register_local_exception<ValueError>(module, "InvalidValue", PyExc_ValueError);
}

}  // namespace vk
