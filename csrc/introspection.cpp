// The Python module genrep_fast._introspection: what the native libraries say about themselves. It
// computes nothing, so that a wheel loses nothing on a Python that it was not built for.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace {

std::string describe(const std::string& library, const std::string& function) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) {
    throw std::runtime_error(library + " is not loaded");
  }
  auto answer = reinterpret_cast<const char* (*)()>(dlsym(handle, function.c_str()));
  std::string text = answer == nullptr ? "" : answer();
  dlclose(handle);  // gives back this handle alone: the library stays loaded
  if (answer == nullptr) {
    throw std::runtime_error(library + " has no function " + function);
  }
  return text;
}

}  // namespace

PYBIND11_MODULE(_introspection, module) {
  module.def(
      "describe", &describe, pybind11::arg("library"), pybind11::arg("function"),
      "JSON text that a function of a loaded native library returns, e.g. "
      "genrep_fast_cpu_build_information or genrep_fast_cuda_kernel_attributes.");
}
