// Stands in for libFuzzer where there is no Clang: feeds the fuzz target random inputs and changed
// inputs of a corpus. It knows nothing of coverage.
//
// [-max_total_time=SECONDS] [-seed=N] [-artifact_prefix=PATH] [FILE or DIRECTORY]...
// as libFuzzer takes them: files are run and nothing else is; a directory is a corpus.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "random.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

// What the handlers below need, for a process that is about to die.
const Bytes* current_input = nullptr;
std::string artifact_path;

void save_current_input() {
  if (current_input == nullptr) return;
  std::FILE* file = std::fopen(artifact_path.c_str(), "wb");
  if (file == nullptr) return;
  std::fwrite(current_input->data(), 1, current_input->size(), file);
  std::fclose(file);
  std::fprintf(stderr, "the input was written to %s\n", artifact_path.c_str());
  current_input = nullptr;
}

void save_and_abort(int) {
  save_current_input();
  std::signal(SIGABRT, SIG_DFL);
  std::abort();
}

void run(const Bytes& input) {
  current_input = &input;
  LLVMFuzzerTestOneInput(input.data(), input.size());
  current_input = nullptr;
}

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(2);
  }
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// Short ones leave the contents to the target's own random numbers, long ones spell them out.
Bytes draw_input(dfs_test::Random& random, const std::vector<Bytes>& corpus) {
  if (!corpus.empty() && random.chance(0.5)) {
    Bytes input =
        corpus[static_cast<size_t>(random.integer(0, static_cast<int64_t>(corpus.size()) - 1))];
    for (int64_t i = random.integer(1, 8); i > 0 && !input.empty(); --i) {
      const int64_t at = random.integer(0, static_cast<int64_t>(input.size()) - 1);
      input[static_cast<size_t>(at)] = static_cast<uint8_t>(random.bits(1));
    }
    return input;
  }
  Bytes input(static_cast<size_t>(random.integer(0, random.chance(0.2) ? 4000 : 100)));
  const bool extreme = random.chance(0.2);
  for (uint8_t& byte : input) {
    byte = static_cast<uint8_t>(extreme ? (random.chance(0.5) ? 0 : 255) : random.bits(1));
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  int64_t seconds = 0;
  uint64_t seed = 0;
  std::string artifact_prefix;
  std::vector<Bytes> files;
  std::vector<Bytes> corpus;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::string value = argument.substr(std::min(argument.find('=') + 1, argument.size()));
    if (argument.rfind("-max_total_time=", 0) == 0) {
      seconds = std::atoll(value.c_str());
    } else if (argument.rfind("-seed=", 0) == 0) {
      seed = std::strtoull(value.c_str(), nullptr, 10);
    } else if (argument.rfind("-artifact_prefix=", 0) == 0) {
      artifact_prefix = value;
    } else if (std::filesystem::is_directory(argument)) {
      for (const auto& entry : std::filesystem::directory_iterator(argument)) {
        if (entry.is_regular_file()) corpus.push_back(read(entry.path()));
      }
    } else {
      files.push_back(read(argument));
    }
  }
  const auto now = Clock::now().time_since_epoch();
  if (seed == 0) seed = static_cast<uint64_t>(now.count()) % 1000000000 + 1;
  artifact_path = artifact_prefix + "crash-" + std::to_string(seed);
  __sanitizer_set_death_callback(save_current_input);
  std::signal(SIGABRT, save_and_abort);

  if (!files.empty()) {
    // The input is on disk already.
    artifact_path.clear();
    for (const Bytes& input : files) run(input);
    std::printf("%zu inputs passed\n", files.size());
    return 0;
  }
  std::printf("seed %llu, %zu inputs in the corpus\n", static_cast<unsigned long long>(seed),
              corpus.size());
  std::fflush(stdout);
  const Clock::time_point end = Clock::now() + std::chrono::seconds(seconds);
  for (const Bytes& input : corpus) run(input);
  dfs_test::Random random(seed);
  int64_t runs = 0;
  for (; Clock::now() < end; ++runs) run(draw_input(random, corpus));
  std::printf("%lld random inputs passed\n", static_cast<long long>(runs));
  return 0;
}
