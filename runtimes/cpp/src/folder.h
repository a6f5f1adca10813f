// Files of a bundle's folder `kernels/`.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "plans.h"

namespace wmk {

std::array<uint8_t, 32> sha256(std::string_view bytes);

// The text of plans.json, whose own digest was compared; throws Error (damaged).
std::string read_plans_file(const std::string& folder);

// Throws Error (damaged) unless `digest`, the member of the text, is the SHA-256 of the text with those digits as zeros.
void check_digest(const std::string& text);

// The bytes of a cubin, whose size and SHA-256 were compared; throws Error (damaged).
std::string read_cubin_file(const std::string& folder, const Cubin& cubin);

}  // namespace wmk
