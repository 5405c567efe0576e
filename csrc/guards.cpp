// The lists of Guards, gone through by the C interface of Python. They belong to the Python object, which alone the
// garbage collector sees; here is no state. Whatever differs is for Python to judge, which knows what may be taken
// over.

#include "guards.h"

#include <cstdint>
#include <iterator>
#include <memory>

namespace odenet {
namespace {

struct Release {
  void operator()(PyObject* x) const { Py_XDECREF(x); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// The lists that Guards gives, in this order.
enum Part : Py_ssize_t {
  kOwners,  // of items, and their keys
  kKeys,
  kReferences,  // to the objects of attributes, called for them; and the attributes' names
  kNames,
  kIds,    // of what was found, items first: addresses
  kMetas,  // of each of these: what a tensor was like, or None
  kSized,  // containers, and their lengths
  kLengths,
  kOrdered,  // dicts, and their keys in order, of one after the other
  kOrder,
  kParts,
};

// As of a tensor, in the order in which Guards notes them.
constexpr const char* kMeta[] = {"requires_grad", "dtype", "shape", "device", "__class__"};
PyObject* meta_names[std::size(kMeta)];
PyObject* of_addresses[4];  // names: data_ptr, is_contiguous, is_neg, stride

Owned item_of(PyObject* owner, PyObject* key) {
  if (!PyDict_CheckExact(owner)) return Owned(PyObject_GetItem(owner, key));
  PyObject* found = PyDict_GetItemWithError(owner, key);
  Py_XINCREF(found);
  return Owned(found);
}

Owned attribute_of(PyObject* reference, PyObject* name) {
  const Owned object(PyObject_CallNoArgs(reference));
  return Owned(object ? PyObject_GetAttr(object.get(), name) : nullptr);
}

bool same_meta(PyObject* tensor, PyObject* meta) {
  for (size_t i = 0; i < std::size(kMeta); ++i) {
    const Owned found(PyObject_GetAttr(tensor, meta_names[i]));
    if (!found || PyObject_RichCompareBool(found.get(), PyTuple_GET_ITEM(meta, i), Py_EQ) != 1) return false;
  }
  return true;
}

bool same_value(PyObject* found, PyObject* id, PyObject* meta) {
  return found != nullptr && found == PyLong_AsVoidPtr(id) && (meta == Py_None || same_meta(found, meta));
}

bool same_keys(PyObject* dict, PyObject* order, Py_ssize_t& place) {
  if (PyDict_CheckExact(dict)) {
    PyObject* key = nullptr;
    for (Py_ssize_t i = 0; PyDict_Next(dict, &i, &key, nullptr); ++place) {
      if (place >= PyList_GET_SIZE(order) || key != PyList_GET_ITEM(order, place)) return false;
    }
    return true;
  }
  const Owned keys(PyObject_GetIter(dict));
  if (!keys) return false;
  for (; const Owned key{PyIter_Next(keys.get())}; ++place) {
    if (place >= PyList_GET_SIZE(order) || key.get() != PyList_GET_ITEM(order, place)) return false;
  }
  return !PyErr_Occurred();
}

// The lists change only in Guards, under the interpreter's lock, and never in length but for the order: they are asked
// anew after whatever may run code.
bool unchanged(PyObject* parts) {
  const auto list = [&](Part part) { return PyTuple_GET_ITEM(parts, part); };
  const auto at = [&](Part part, Py_ssize_t i) { return PyList_GET_ITEM(list(part), i); };
  const Py_ssize_t items = PyList_GET_SIZE(list(kOwners));
  for (Py_ssize_t i = 0; i < items; ++i) {
    const Owned found = item_of(at(kOwners, i), at(kKeys, i));
    if (!same_value(found.get(), at(kIds, i), at(kMetas, i))) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list(kNames)); ++i) {
    const Owned found = attribute_of(at(kReferences, i), at(kNames, i));
    if (!same_value(found.get(), at(kIds, items + i), at(kMetas, items + i))) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list(kSized)); ++i) {
    const Py_ssize_t size = PyObject_Size(at(kSized, i));
    if (size < 0 || size != PyLong_AsSsize_t(at(kLengths, i))) return false;
  }
  Py_ssize_t place = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list(kOrdered)); ++i) {
    if (!same_keys(at(kOrdered, i), list(kOrder), place)) return false;
  }
  return place == PyList_GET_SIZE(list(kOrder));
}

PyObject* py_unchanged(PyObject*, PyObject* parts) {
  if (!PyTuple_CheckExact(parts) || PyTuple_GET_SIZE(parts) != kParts) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes the lists of Guards");
    return nullptr;
  }
  const bool held = unchanged(parts);
  PyErr_Clear();  // what cannot be asked has changed
  return PyBool_FromLong(held);
}

bool is(PyObject* x, PyObject* question, bool answer) {
  const Owned found(PyObject_CallMethodNoArgs(x, question));
  return found.get() == (answer ? Py_True : Py_False);
}

// The address of a constant that is a view of this tensor, if that lies as it did; else null. view: (shape, strides,
// dtype, device, offset in bytes, whether that is contiguous).
PyObject* address(PyObject* tensor, PyObject* view) {
  constexpr int kAsked[] = {2, 1, 3};  // of kMeta, in the order of view without the strides
  constexpr int kPlaces[] = {0, 2, 3};
  for (int i = 0; i < 3; ++i) {
    const Owned found(PyObject_GetAttr(tensor, meta_names[kAsked[i]]));
    if (!found || PyObject_RichCompareBool(found.get(), PyTuple_GET_ITEM(view, kPlaces[i]), Py_EQ) != 1) return nullptr;
  }
  if (PyTuple_GET_ITEM(view, 5) == Py_True) {
    if (!is(tensor, of_addresses[1], true)) return nullptr;
  } else {
    const Owned found(PyObject_CallMethodNoArgs(tensor, of_addresses[3]));
    if (!found || PyObject_RichCompareBool(found.get(), PyTuple_GET_ITEM(view, 1), Py_EQ) != 1) return nullptr;
  }
  if (!is(tensor, of_addresses[2], false)) return nullptr;
  const Owned begin(PyObject_CallMethodNoArgs(tensor, of_addresses[0]));
  return begin ? PyNumber_Add(begin.get(), PyTuple_GET_ITEM(view, 4)) : nullptr;
}

// addresses(tensors, views): a tuple with the address of each view of a tensor, or None where one does not lie as it
// did.
PyObject* py_addresses(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyList_CheckExact(args[0]) || !PyTuple_CheckExact(args[1]) ||
      PyList_GET_SIZE(args[0]) != PyTuple_GET_SIZE(args[1])) {
    PyErr_SetString(PyExc_TypeError, "addresses takes a list of tensors and a tuple of as many views");
    return nullptr;
  }
  Owned found(PyTuple_New(PyTuple_GET_SIZE(args[1])));
  for (Py_ssize_t i = 0; found && i < PyTuple_GET_SIZE(args[1]); ++i) {
    PyObject* one = address(PyList_GET_ITEM(args[0], i), PyTuple_GET_ITEM(args[1], i));
    if (one == nullptr) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    PyTuple_SET_ITEM(found.get(), i, one);
  }
  return found.release();
}

PyMethodDef kFunctions[] = {
    {"unchanged", py_unchanged, METH_O, "Whether all that these lists hold is as it was."},
    {"addresses", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_addresses)), METH_FASTCALL,
     "The addresses of views of tensors, or None where one does not lie as it did."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_guards(PyObject* module) {
  for (size_t i = 0; i < std::size(kMeta); ++i) meta_names[i] = PyUnicode_InternFromString(kMeta[i]);
  constexpr const char* names[] = {"data_ptr", "is_contiguous", "is_neg", "stride"};
  for (size_t i = 0; i < std::size(names); ++i) of_addresses[i] = PyUnicode_InternFromString(names[i]);
  return PyModule_AddFunctions(module, kFunctions);
}

}  // namespace odenet
