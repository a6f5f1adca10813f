// Errors inside the library: exceptions with one line, which the C ABI turns into a status and wmk_last_error.
#pragma once

#include <stdexcept>
#include <string>

#include "wm_kernels.h"

namespace wmk {

class Error : public std::runtime_error {
 public:
  Error(wmk_status status, const std::string& line) : std::runtime_error(line), status(status) {}
  wmk_status status;
};

inline Error damaged(const std::string& line) { return {WMK_DAMAGED, line}; }
inline Error refused(const std::string& line) { return {WMK_REFUSED, line}; }
inline Error unavailable(const std::string& line) { return {WMK_UNAVAILABLE, line}; }
inline Error failed(const std::string& line) { return {WMK_FAILED, line}; }

// Text from a caller or a file, fit for one line of a message.
std::string in_quotes(const std::string& text);

}  // namespace wmk
