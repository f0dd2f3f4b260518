// Python bindings of weight_transfer._core, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "device_arena.hpp"
#include "digest.hpp"
#include "host_arena.hpp"
#include "isa.hpp"
#include "scatter.hpp"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Release = py::call_guard<py::gil_scoped_release>;
using Strides = std::vector<std::int64_t>;
using JobTuple =
    std::tuple<std::uintptr_t, std::string, Strides, std::uintptr_t, std::string, Strides, Strides>;

std::uint64_t scatter(const std::vector<JobTuple>& tuples, std::int64_t threads) {
    std::vector<tandem::ScatterJob> jobs;
    jobs.reserve(tuples.size());
    for (const auto& [src, src_dtype, src_strides, dst, dst_dtype, dst_strides, shape] : tuples) {
        jobs.push_back({src, tandem::parse_dtype(src_dtype), src_strides, dst, tandem::parse_dtype(dst_dtype),
                        dst_strides, shape});
    }
    return tandem::scatter(jobs, threads);
}

std::vector<std::uint64_t> digest_regions(const std::vector<std::tuple<std::uintptr_t, std::uint64_t>>& pairs,
                                          std::int64_t threads) {
    std::vector<tandem::Region> regions;
    regions.reserve(pairs.size());
    for (const auto& [address, nbytes] : pairs) regions.push_back({address, nbytes});
    return tandem::digest_regions(regions, threads);
}

void raise_os_error(std::exception_ptr raised) {
    try {
        if (raised) std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
        // OSError picks its subclass (PermissionError, ...) from errno.
        PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The weight plane's C++: arenas of host and device memory, batched cast-and-scatter, digest.";
    py::register_local_exception_translator(raise_os_error);

    py::class_<tandem::HostArena>(m, "HostArena", py::buffer_protocol(),
                                  "Sealed shared memory; its buffer is writable and keeps it alive.")
        .def_static("create", &tandem::HostArena::create, "name"_a, "size"_a, Release())
        .def_static("open", &tandem::HostArena::open, "fd"_a, "size"_a, Release())
        .def_property_readonly("fd", &tandem::HostArena::fd)
        .def_property_readonly("size", &tandem::HostArena::size)
        .def_property_readonly(
            "address",
            [](const tandem::HostArena& self) { return reinterpret_cast<std::uintptr_t>(self.address()); })
        .def_buffer([](tandem::HostArena& self) {
            return py::buffer_info(static_cast<std::uint8_t*>(self.address()),
                                   static_cast<py::ssize_t>(self.size()), false);
        });

    py::class_<tandem::DeviceArena>(m, "DeviceArena", "Shared memory of a CUDA device.")
        .def_static("create", &tandem::DeviceArena::create, "device"_a, "size"_a, Release())
        .def_static("open", &tandem::DeviceArena::open, "fd"_a, "device"_a, "size"_a, Release())
        .def_property_readonly("fd", &tandem::DeviceArena::fd)
        .def_property_readonly("device", &tandem::DeviceArena::device)
        .def_property_readonly("size", &tandem::DeviceArena::size)
        .def_property_readonly("address", &tandem::DeviceArena::address);

    m.def("scatter", &scatter, "jobs"_a, "threads"_a = 0, Release());

    m.def(
        "digest_partial",
        [](std::uintptr_t address, std::uint64_t nbytes, std::uint64_t first_word, std::int64_t threads) {
            return tandem::digest_partial({address, nbytes}, first_word, threads);
        },
        "address"_a, "nbytes"_a, "first_word"_a = 0, "threads"_a = 0, Release());
    m.def("digest_finish", &tandem::digest_finish, "sum"_a, "nbytes"_a);
    m.def("digest_regions", &digest_regions, "regions"_a, "threads"_a = 0, Release());
    m.def(
        "digest_combine",
        [](const std::vector<std::uint64_t>& digests) { return tandem::digest_combine(digests); },
        "digests"_a, Release());

    m.def(
        "limit_isa", &tandem::limit_isa, "name"_a,
        "Use at most this instruction set (baseline, avx2, avx512; auto: no limit); returns the one in use.");
}
