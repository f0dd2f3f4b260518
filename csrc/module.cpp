// Python bindings of weight_transfer._core, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "device_arena.hpp"
#include "digest.hpp"
#include "host_arena.hpp"
#include "isa.hpp"
#include "nccl.hpp"
#include "scatter.hpp"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

// To give a device's memory back waits for all that the device does: other threads go on meanwhile.
struct Unlocked {
    template <typename T>
    void operator()(T* owned) const {
        py::gil_scoped_release release;
        delete owned;
    }
};
template <typename T>
using Owned = std::unique_ptr<T, Unlocked>;
using Strides = std::vector<std::int64_t>;
using JobTuple =
    std::tuple<std::uintptr_t, std::string, Strides, std::uintptr_t, std::string, Strides, Strides>;

using SpanTuple = std::tuple<std::uintptr_t, std::uint64_t>;
using RowsTuple =
    std::tuple<std::uintptr_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;

std::uint64_t scatter(const std::vector<JobTuple>& tuples, std::int64_t threads) {
    std::vector<tandem::ScatterJob> jobs;
    jobs.reserve(tuples.size());
    for (const auto& [src, src_dtype, src_strides, dst, dst_dtype, dst_strides, shape] : tuples) {
        jobs.push_back({src, tandem::parse_dtype(src_dtype), src_strides, dst, tandem::parse_dtype(dst_dtype),
                        dst_strides, shape});
    }
    return tandem::scatter(jobs, threads);
}

std::vector<std::uint64_t> digest_rows(const std::vector<RowsTuple>& tuples, std::int64_t threads) {
    std::vector<tandem::Rows> parts;
    parts.reserve(tuples.size());
    for (const auto& [address, nbytes, rows, stride, first_word, word_stride] : tuples)
        parts.push_back({address, nbytes, rows, stride, first_word, word_stride});
    return tandem::digest_rows(parts, threads);
}

std::vector<std::uint64_t> digest_regions(const std::vector<SpanTuple>& pairs, std::int64_t threads) {
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
    m.doc() =
        "The weight plane's C++: arenas of host and device memory, batched cast-and-scatter, digest, NCCL.";
    py::register_local_exception_translator(raise_os_error);

    py::class_<tandem::HostArena, Owned<tandem::HostArena>>(
        m, "HostArena", py::buffer_protocol(),
        "Sealed shared memory; its buffer is writable and keeps it alive.")
        .def_static("create", &tandem::HostArena::create, "name"_a, "size"_a, Release())
        .def_static("open", &tandem::HostArena::open, "fd"_a, "size"_a, Release())
        .def("forget", &tandem::HostArena::forget, Release())
        .def_property_readonly("fd", &tandem::HostArena::fd)
        .def_property_readonly("size", &tandem::HostArena::size)
        .def_property_readonly(
            "address",
            [](const tandem::HostArena& self) { return reinterpret_cast<std::uintptr_t>(self.address()); })
        .def_buffer([](tandem::HostArena& self) {
            return py::buffer_info(static_cast<std::uint8_t*>(self.address()),
                                   static_cast<py::ssize_t>(self.size()), false);
        });

    py::class_<tandem::DeviceArena, Owned<tandem::DeviceArena>>(m, "DeviceArena",
                                                                "Shared memory of a CUDA device.")
        .def_static("create", &tandem::DeviceArena::create, "device"_a, "size"_a, Release())
        .def_static("open", &tandem::DeviceArena::open, "fd"_a, "device"_a, "size"_a, Release())
        .def_static("adopt", &tandem::DeviceArena::adopt, "address"_a, "device"_a, "size"_a, Release())
        .def_property_readonly("fd", &tandem::DeviceArena::fd)
        .def_property_readonly("device", &tandem::DeviceArena::device)
        .def_property_readonly("size", &tandem::DeviceArena::size)
        .def_property_readonly("address", &tandem::DeviceArena::address);

    m.def("load_nccl", &tandem::nccl::load, "path"_a, Release());
    m.def("nccl_unique_id", [] {
        py::gil_scoped_release release;
        const std::string id = tandem::nccl::unique_id();
        py::gil_scoped_acquire acquire;
        return py::bytes(id);
    });
    py::class_<tandem::nccl::Communicator>(m, "Communicator", "One rank's end of a communicator of NCCL's.")
        .def(py::init([](const py::bytes& id, int rank, int size) {
                 const std::string given = id;
                 py::gil_scoped_release release;
                 return std::make_unique<tandem::nccl::Communicator>(given, rank, size);
             }),
             "id"_a, "rank"_a, "size"_a)
        .def("ready", &tandem::nccl::Communicator::ready, Release())
        .def(
            "broadcast",
            [](tandem::nccl::Communicator& self, const std::vector<SpanTuple>& tuples, int root,
               std::uintptr_t stream) {
                std::vector<tandem::nccl::Span> spans;
                spans.reserve(tuples.size());
                for (const auto& [address, nbytes] : tuples) spans.push_back({address, nbytes});
                self.broadcast(spans, root, stream);
            },
            "spans"_a, "root"_a, "stream"_a, Release())
        .def("abort", &tandem::nccl::Communicator::abort, Release());

    m.def("scatter", &scatter, "jobs"_a, "threads"_a = 0, Release());

    m.def(
        "digest_partial",
        [](std::uintptr_t address, std::uint64_t nbytes, std::uint64_t first_word, std::int64_t threads) {
            return tandem::digest_partial({address, nbytes}, first_word, threads);
        },
        "address"_a, "nbytes"_a, "first_word"_a = 0, "threads"_a = 0, Release());
    m.def("digest_finish", &tandem::digest_finish, "sum"_a, "nbytes"_a);
    m.def("digest_rows", &digest_rows, "parts"_a, "threads"_a = 0, Release());
    m.def("digest_regions", &digest_regions, "regions"_a, "threads"_a = 0, Release());
    m.def(
        "digest_combine",
        [](const std::vector<std::uint64_t>& digests) { return tandem::digest_combine(digests); },
        "digests"_a, Release());

    m.def(
        "limit_isa", &tandem::limit_isa, "name"_a,
        "Use at most this instruction set (baseline, avx2, avx512; auto: no limit); returns the one in use.");
}
