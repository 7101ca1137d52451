// The pybind11 face of the pure planner: plain structs with named fields, four functions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bindings.h"
#include "plan.h"
#include "simulate.h"

namespace py = pybind11;
using namespace py::literals;

namespace blockswap {
namespace {

// Every struct here is an aggregate of defaults, so a constructor is: take the defaults, then set
// the named fields. An unknown name is a TypeError, as for any Python constructor.
template <typename T>
auto from_keywords(const char* type_name) {
  return py::init([type_name](const py::kwargs& fields) {
    T value;
    py::object object = py::cast(&value, py::return_value_policy::reference);
    for (const auto& [key, field] : fields) {
      if (!py::hasattr(object, key)) {
        throw py::type_error(std::string(type_name) + " has no field '" +
                             py::cast<std::string>(key) + "'");
      }
      py::setattr(object, key, field);
    }
    return value;
  });
}

std::string bytes_text(int64_t bytes) { return std::to_string(bytes); }

void bind_request(py::module_& m) {
  py::class_<Leaf>(m, "Leaf", "One leaf module, in the order in which the model runs it.")
      .def(from_keywords<Leaf>("Leaf"))
      .def_readwrite("name", &Leaf::name)
      .def_readwrite("bytes", &Leaf::bytes)
      .def_readwrite("seconds", &Leaf::seconds)
      .def_readwrite("tail_seconds", &Leaf::tail_seconds)
      .def_readwrite("host_seconds", &Leaf::host_seconds)
      .def_readwrite("block", &Leaf::block)
      .def_readwrite("priority", &Leaf::priority)
      .def_readwrite("cut_before", &Leaf::cut_before)
      .def("__repr__", [](const Leaf& leaf) {
        return "Leaf(" + leaf.name + ", bytes=" + bytes_text(leaf.bytes) +
               ", seconds=" + std::to_string(leaf.seconds) + ")";
      });
  py::class_<Block>(m, "Block", "A repeated module as the model declares it.")
      .def(from_keywords<Block>("Block"))
      .def_readwrite("name", &Block::name)
      .def_readwrite("list", &Block::list)
      .def("__repr__",
           [](const Block& block) { return "Block(" + block.name + ", list=" + block.list + ")"; });
  py::class_<Link>(m, "Link", "Speed of the way from home to device, and the cost of one copy.")
      .def(from_keywords<Link>("Link"))
      .def_readwrite("bytes_per_second", &Link::bytes_per_second)
      .def_readwrite("seconds_per_copy", &Link::seconds_per_copy)
      .def("__repr__", [](const Link& link) {
        return "Link(bytes_per_second=" + std::to_string(link.bytes_per_second) + ")";
      });
  py::class_<PlanRequest>(m, "PlanRequest", "What the planner is asked; see csrc/plan.h.")
      .def(from_keywords<PlanRequest>("PlanRequest"))
      .def_readwrite("leaves", &PlanRequest::leaves)
      .def_readwrite("blocks", &PlanRequest::blocks)
      .def_readwrite("link", &PlanRequest::link)
      .def_readwrite("head_seconds", &PlanRequest::head_seconds)
      .def_readwrite("host_seconds", &PlanRequest::host_seconds)
      .def_readwrite("host_seconds_per_copy", &PlanRequest::host_seconds_per_copy)
      .def_readwrite("budget_bytes", &PlanRequest::budget_bytes)
      .def_readwrite("offload_bytes", &PlanRequest::offload_bytes)
      .def_readwrite("offload_blocks", &PlanRequest::offload_blocks)
      .def_readwrite("ring_bytes", &PlanRequest::ring_bytes)
      .def_readwrite("piece_bytes", &PlanRequest::piece_bytes)
      .def_readwrite("lookahead", &PlanRequest::lookahead)
      .def("__repr__", [](const PlanRequest& request) {
        return "PlanRequest(" + std::to_string(request.leaves.size()) +
               " leaves, budget_bytes=" + bytes_text(request.budget_bytes) + ")";
      });
}

void bind_result(py::module_& m) {
  py::class_<Piece>(m, "Piece", "The tensors that move together.")
      .def(from_keywords<Piece>("Piece"))
      .def_readwrite("first_leaf", &Piece::first_leaf)
      .def_readwrite("end_leaf", &Piece::end_leaf)
      .def_readwrite("bytes", &Piece::bytes)
      .def_readwrite("seconds", &Piece::seconds)
      .def_readwrite("tail_seconds", &Piece::tail_seconds)
      .def_readwrite("resident", &Piece::resident)
      .def_readwrite("slot_offset", &Piece::slot_offset)
      .def_readwrite("after", &Piece::after)
      .def("__repr__", [](const Piece& piece) {
        const std::string leaves =
            std::to_string(piece.first_leaf) + ".." + std::to_string(piece.end_leaf);
        return "Piece(leaves " + leaves + ", bytes=" + bytes_text(piece.bytes) +
               (piece.resident ? ", resident)"
                               : ", slot_offset=" + bytes_text(piece.slot_offset) +
                                     ", after=" + std::to_string(piece.after) + ")");
      });
  py::class_<Plan>(m, "Plan", "Which pieces stay, which stream, and through which slot.")
      .def(from_keywords<Plan>("Plan"))
      .def_readwrite("pieces", &Plan::pieces)
      .def_readwrite("ring_bytes", &Plan::ring_bytes)
      .def_readwrite("resident_bytes", &Plan::resident_bytes)
      .def_readwrite("streamed_bytes", &Plan::streamed_bytes)
      .def_readwrite("piece_bytes", &Plan::piece_bytes)
      .def_readwrite("copy_on_compute", &Plan::copy_on_compute)
      .def_readwrite("compute_seconds", &Plan::compute_seconds)
      .def_readwrite("host_seconds", &Plan::host_seconds)
      .def_readwrite("predicted_seconds", &Plan::predicted_seconds)
      .def_readwrite("bound_seconds", &Plan::bound_seconds)
      .def_readwrite("search_visits", &Plan::search_visits)
      .def_readwrite("reason", &Plan::reason)
      .def("__repr__", [](const Plan& plan) {
        return "Plan(" + std::to_string(plan.pieces.size()) +
               " pieces, resident_bytes=" + bytes_text(plan.resident_bytes) +
               ", streamed_bytes=" + bytes_text(plan.streamed_bytes) +
               ", ring_bytes=" + bytes_text(plan.ring_bytes) + ")";
      });
  py::class_<SimulatedPiece>(m, "SimulatedPiece", "One piece in the last simulated step.")
      .def(from_keywords<SimulatedPiece>("SimulatedPiece"))
      .def_readwrite("copy_begin", &SimulatedPiece::copy_begin)
      .def_readwrite("copy_end", &SimulatedPiece::copy_end)
      .def_readwrite("run_begin", &SimulatedPiece::run_begin)
      .def_readwrite("run_end", &SimulatedPiece::run_end)
      .def_readwrite("stall_seconds", &SimulatedPiece::stall_seconds)
      .def("__repr__", [](const SimulatedPiece& piece) {
        return "SimulatedPiece(run " + std::to_string(piece.run_begin) + ".." +
               std::to_string(piece.run_end) + " s, stall " + std::to_string(piece.stall_seconds) +
               " s)";
      });
  py::class_<Simulation>(m, "Simulation", "A step in steady state.")
      .def(from_keywords<Simulation>("Simulation"))
      .def_readwrite("step_seconds", &Simulation::step_seconds)
      .def_readwrite("stall_seconds", &Simulation::stall_seconds)
      .def_readwrite("link_busy_seconds", &Simulation::link_busy_seconds)
      .def_readwrite("pieces", &Simulation::pieces)
      .def("__repr__", [](const Simulation& simulation) {
        return "Simulation(step " + std::to_string(simulation.step_seconds) + " s, stall " +
               std::to_string(simulation.stall_seconds) + " s)";
      });
}

}  // namespace

void bind_plan(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.attr("ALIGNMENT") = kAlignment;
  m.attr("PINNED") = kPinned;
  m.attr("NO_PRIORITY") = kNoPriority;
  bind_request(m);
  bind_result(m);
  m.def("make_plan", &make_plan, "request"_a, NoGil(), "The best plan that the search finds.");
  // The plan is changed in place, as in C++.
  m.def("predict", &predict, "plan"_a, "request"_a,
        "Fills in what a plan costs under a request whose times may be newer.");
  m.def("assign_slots", &assign_slots, "plan"_a, "request"_a,
        "Gives slots and fetch dependencies to pieces whose residency is settled.");
  m.def("validate", &validate, "plan"_a, "request"_a, "Raises ConfigError when a plan is wrong.");
  m.def("explain", &explain, "plan"_a, "request"_a, "A table for people.");
  m.def("simulate", &simulate, "plan"_a, "request"_a, NoGil(),
        "Replays a plan until its step time is steady.");
}

}  // namespace blockswap
