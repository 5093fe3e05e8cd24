// Stands in for common/download.cpp and common/hf-cache.cpp, which need sockets: upstream's argument parser refers to
// them, and a test in the sandbox that reaches one has asked for something it must not get.

#include "common.h"
#include "download.h"
#include "hf-cache.h"

#include <stdexcept>

[[noreturn]] static void refuse(const char * name) {
    throw std::runtime_error(std::string(name) + ": no network in the sandbox");
}

common_download_hf_plan common_download_get_hf_plan(const common_params_model &, const common_download_opts &) {
    refuse(__func__);
}

std::vector<std::string> common_download_get_all_parts(const std::string &) {
    refuse(__func__);
}

std::string common_docker_resolve_model(const std::string &) {
    refuse(__func__);
}

void common_download_run_tasks(const std::vector<common_download_task> & tasks) {
    if (!tasks.empty()) {
        refuse(__func__);
    }
}

std::vector<common_cached_model_info> common_list_cached_models() {
    return {};
}

std::string hf_cache::finalize_file(const hf_file &) {
    refuse(__func__);
}
