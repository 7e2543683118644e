// The memory nodes of this computer, the cores that this process may use on each, and memory that lies on one of them.
//
// Read from /sys/devices/system/node; a number of nodes can be pretended, so that a computer with one node runs the
// code of several. Knows neither threads nor weights.
#pragma once

#include <cstddef>
#include <vector>

namespace moesaic {

struct NumaNode {
    int id;                               // the system's number; kPretended: memory is not bound to this node
    std::vector<std::vector<int>> cores;  // at least one; the CPUs of each that this process may use
};
constexpr int kPretended = -1;

// The nodes on which this process may use cores, or those that set_numa_nodes asks for; at least one. A single node is
// always a pretended one: there is nothing to bind.
std::vector<NumaNode> numa_nodes();

// Divide the usable cores into `count` pretended nodes of equal size (sharing cores where there are fewer); 0: the
// nodes of the system. Holds for numa_nodes() from then on. Throws std::invalid_argument unless 0 <= count <= 64.
void set_numa_nodes(int count);

// Let untouched memory (aligned to pages) lie on node number `index` of `nodes`, or spread over all of them if index is
// -1. Without effect on pretended nodes. Where the system forbids memory policies (containers often do), a thread on
// the node touches the memory, which has it put there. Throws std::out_of_range for a node that is not there.
void place_memory(void* address, std::size_t num_bytes, int index, const std::vector<NumaNode>& nodes = numa_nodes());

// Confine the calling thread to these CPUs; false if the system refuses.
bool confine_thread(const std::vector<int>& cpus);

}  // namespace moesaic
