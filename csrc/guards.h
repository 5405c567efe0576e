// What a plan of a compiled field has read from Python, compared at every call; see odenet_cuda/compiled/guards.py.
#pragma once

#include <Python.h>

namespace odenet {

// Adds `unchanged` and `addresses` to the module. Returns -1 with a Python error set, or 0.
int add_guards(PyObject* module);

}  // namespace odenet
