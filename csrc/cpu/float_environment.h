// Rounding to nearest and no flushing of denormals for the lifetime of an object. Flags are per
// thread (torch.set_flush_denormal sets the caller's only), and a result must not depend on which
// thread computed it.
#pragma once

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace dfs {

class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

#if defined(__SSE__) || defined(_M_X64)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(kDefaultControl); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDefaultControl = 0x1f80;
  unsigned saved_;
#else
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

}  // namespace dfs
