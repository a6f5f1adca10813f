#include "folder.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"

namespace wmk {
namespace {

constexpr size_t MAX_PLANS = 64 << 20;
constexpr size_t DIGITS = 64;

class File {
 public:
  explicit File(const std::string& path) : descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
  ~File() {
    if (descriptor >= 0) ::close(descriptor);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  const int descriptor;
};

// Folders are named by users: what of them a message shows is one line all the same.
std::string shown(const std::string& path) {
  std::string line;
  for (const char c : path.substr(0, 300)) line += static_cast<unsigned char>(c) < ' ' || c == 127 ? '?' : c;
  return line;
}

std::string read_all(const std::string& path, size_t most) {
  const File file(path);
  if (file.descriptor < 0) throw damaged(shown(path) + " cannot be opened: " + std::strerror(errno) + "; export the bundle again");
  struct stat status {};
  if (::fstat(file.descriptor, &status) != 0 || !S_ISREG(status.st_mode))
    throw damaged(shown(path) + " is no file; export the bundle again");
  const auto size = static_cast<size_t>(status.st_size);
  if (size > most) {
    throw damaged(shown(path) + " has " + std::to_string(size) + " bytes, expected at most " + std::to_string(most) +
                  "; export the bundle again");
  }
  std::string bytes(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t count = ::read(file.descriptor, &bytes[done], size - done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0)
      throw damaged(shown(path) + " cannot be read: " + (count < 0 ? std::strerror(errno) : "it became shorter") + "; try again");
    done += static_cast<size_t>(count);
  }
  return bytes;
}

std::string hex(const std::array<uint8_t, 32>& bytes) {
  std::string text;
  for (const uint8_t byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

// The digits of the top member `digest`: the first `"digest"` followed by a colon and 64 digits. The parser later finds no second one.
size_t digest_place(const std::string& text) {
  for (size_t at = text.find("\"digest\""); at != std::string::npos; at = text.find("\"digest\"", at + 1)) {
    size_t next = at + 8;
    const auto skip = [&](char wanted) {
      while (next < text.size() && (text[next] == ' ' || text[next] == '\n' || text[next] == '\r' || text[next] == '\t')) ++next;
      return next < text.size() && text[next++] == wanted;
    };
    if (!skip(':') || !skip('"') || next + DIGITS >= text.size() || text[next + DIGITS] != '"') continue;
    if (text.find_first_not_of("0123456789abcdef", next) == next + DIGITS) return next;
  }
  return std::string::npos;
}

}  // namespace

std::array<uint8_t, 32> sha256(std::string_view bytes) {
  std::array<uint8_t, 32> digest{};
  unsigned length = 0;
  if (EVP_Digest(bytes.data(), bytes.size(), digest.data(), &length, EVP_sha256(), nullptr) != 1 || length != digest.size()) {
    throw failed("OpenSSL computes no SHA-256 here; look at its configuration (openssl.cnf)");
  }
  return digest;
}

void check_digest(const std::string& text) {
  const size_t place = digest_place(text);
  if (place == std::string::npos) throw damaged("plans.json has no member digest of 64 hexadecimal digits; export the bundle again");
  std::string zeroed = text;
  zeroed.replace(place, DIGITS, DIGITS, '0');
  if (hex(sha256(zeroed)) != text.substr(place, DIGITS)) {
    throw damaged("plans.json is not the file that its digest was made of; copy or export the bundle again");
  }
}

std::string read_plans_file(const std::string& folder) {
  std::string text = read_all(folder + "/plans.json", MAX_PLANS);
  check_digest(text);
  return text;
}

std::string read_cubin_file(const std::string& folder, const Cubin& cubin) {
  const std::string path = folder + "/" + cubin.file;
  std::string bytes = read_all(path, cubin.size);
  if (bytes.size() != cubin.size) {
    throw damaged(shown(path) + " has " + std::to_string(bytes.size()) + " bytes, expected " + std::to_string(cubin.size) +
                  "; copy or export the bundle again");
  }
  if (sha256(bytes) != cubin.sha256)
    throw damaged(shown(path) + " is not the file that was exported (SHA-256); copy or export the bundle again");
  return bytes;
}

}  // namespace wmk
