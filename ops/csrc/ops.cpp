// Schemas of the operators; kernels, fake implementations and autograd are registered beside their code.
#include <Python.h>
#include <torch/library.h>

#include "built_from.h"  // setup.py writes it: WSID_SOURCES, of ops/sources.py

TORCH_LIBRARY(wsid, m) {
  m.def("converge_centroids(Tensor offsets, int max_iters, float tol) -> Tensor");
  m.def("boundary_affinity(Tensor boundary, int radius, bool with_winner) -> (Tensor, Tensor)");
  m.def("boundary_affinity_backward(Tensor grad, Tensor winner, int radius) -> Tensor");
  m.def("pair_counts(Tensor labels, int radius) -> Tensor");
  m.def("boundary_pair_loss(Tensor boundary, Tensor labels, int radius) -> Tensor");
  m.def("boundary_pair_loss_backward(Tensor grad, Tensor boundary, Tensor labels, int radius) -> Tensor");
  m.def("displacement_pair_loss(Tensor offsets, Tensor labels, int radius) -> Tensor");
  m.def("displacement_pair_loss_backward(Tensor grad, Tensor offsets, Tensor labels, int radius) -> Tensor");
  m.def("random_walk(Tensor x, Tensor affinity, int radius, float power, int steps, float[] coefficients) -> Tensor");
}

#define WSID_TEXT_OF(name) #name
#define WSID_TEXT(name) WSID_TEXT_OF(name)

// Importing ops._C is what loads the library; the module itself only says what it was built from and for.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module) {
    PyModule_AddStringConstant(module, "SOURCES", WSID_SOURCES);
    PyModule_AddStringConstant(module, "TORCH", WSID_TEXT(WSID_TORCH));
  }
  return module;
}
