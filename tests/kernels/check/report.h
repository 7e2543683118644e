// Counts what was compared and names what differs.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace check {

class Report {
  public:
    // Counts anew. `subject` begins the name of every mismatch.
    void start(std::string subject);
    void expect(bool holds, const std::string& name);
    // Every |actual - expected| <= allowed[i] + tolerance * the largest |expected|; a NaN fails. `allowed` may be
    // empty.
    void expect_close(const std::vector<float>& actual, const std::vector<double>& expected, double tolerance,
                      const std::string& name, const std::vector<double>& allowed = {});
    // Prints the subject's line.
    void finish();
    bool all_good() const { return total_failures_ == 0; }

  private:
    void fail(const std::string& what);

    std::string subject_;
    std::int64_t comparisons_ = 0, failures_ = 0, total_failures_ = 0;
};

// The arguments one after the other, as text.
template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace check
