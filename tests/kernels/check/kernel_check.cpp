// The kernels against double precision, without Python: for sanitizers, and for processors that only an emulator has.
//
//   kernel_check [instruction set ...] [part ...] [threads=N]
//
// Without arguments: every part on every instruction set that can run here. Prints a line for each; exits with 1 and
// names the first mismatches if there are any, with 2 for an argument that it does not know.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "dispatch.h"
#include "parts.h"
#include "thread_pool.h"

namespace {

using check::Report;

struct Part {
    const char* name;
    void (*run)(Report&);
};

constexpr Part kOfAll[] = {{"packing", check::check_packing}, {"quantisers", check::check_quantisers}};
constexpr Part kOfEach[] = {{"linear", check::check_linear},   {"heads", check::check_heads},
                            {"experts", check::check_experts}, {"rows", check::check_rows},
                            {"routing", check::check_routing}, {"attention", check::check_attention},
                            {"states", check::check_states},   {"threads", check::check_threads}};

struct Options {
    std::vector<std::string> isas, parts;
    int num_threads = 3;

    bool wants(const Part& part) const {
        return parts.empty() || std::find(parts.begin(), parts.end(), part.name) != parts.end();
    }
};

bool is_part(const std::string& name) {
    auto same = [&](const Part& part) { return name == part.name; };
    return std::any_of(std::begin(kOfAll), std::end(kOfAll), same) ||
           std::any_of(std::begin(kOfEach), std::end(kOfEach), same);
}

Options parse(int argc, char** argv) {
    const std::vector<std::string> usable = moesaic::usable_isas();
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word.starts_with("threads=")) {
            options.num_threads = std::atoi(word.c_str() + 8);
        } else if (std::find(usable.begin(), usable.end(), word) != usable.end()) {
            options.isas.push_back(word);
        } else if (is_part(word)) {
            options.parts.push_back(word);
        } else {
            std::string known = "threads=N";
            for (const std::string& isa : usable) known += ", " + isa;
            for (const Part& part : kOfAll) known += std::string(", ") + part.name;
            for (const Part& part : kOfEach) known += std::string(", ") + part.name;
            std::fprintf(stderr, "kernel_check: '%s' is none of %s\n", word.c_str(), known.c_str());
            std::exit(2);
        }
    }
    if (options.isas.empty()) options.isas = usable;
    return options;
}

template <std::size_t kCount>
void run_parts(Report& report, const Options& options, const std::string& subject, const Part (&parts)[kCount]) {
    if (std::none_of(std::begin(parts), std::end(parts), [&](const Part& part) { return options.wants(part); })) return;
    report.start(subject);
    for (const Part& part : parts) {
        if (!options.wants(part)) continue;
        try {
            part.run(report);
        } catch (const std::exception& error) {
            report.expect(false, std::string(part.name) + " ended with: " + error.what());
        }
    }
    report.finish();
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse(argc, argv);
    moesaic::set_num_threads(options.num_threads);
    Report report;
    run_parts(report, options, "formats", kOfAll);
    for (const std::string& isa : options.isas) {
        moesaic::set_isa(isa);
        run_parts(report, options, isa, kOfEach);
    }
    return report.all_good() ? 0 : 1;
}
