// Products by tiles round weights otherwise than those of few tokens, so that what a token gets depends on how many
// tokens a call has; so do transposed weights and expanded latents. Whoever needs the same numbers for a sequence in
// any batch does without them.
#pragma once

namespace moesaic {

// Whether products that this thread asks for give a token the same, to the bit, whatever the number of tokens.
bool independent_rows();
// From the next call on; returns what it was.
bool set_independent_rows(bool on);

// While it lives, products of this thread are `on` or not.
class IndependentRows {
  public:
    explicit IndependentRows(bool on) : before_(set_independent_rows(on)) {}
    ~IndependentRows() { set_independent_rows(before_); }
    IndependentRows(const IndependentRows&) = delete;
    IndependentRows& operator=(const IndependentRows&) = delete;

  private:
    bool before_;
};

}  // namespace moesaic
