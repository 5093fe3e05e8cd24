// Where repacked weights live: the buffer type that llama.cpp offers weights of matrix products to (use_extra_bufts), in the
// place of upstream's own, which has nothing for wasm. What is put into such a buffer is woven into strips (strips.h).
//
// Weaving takes time and memory of the sandbox's own. So the host keeps what a buffer holds in a file, and gives that to the
// next load of the same model: then the buffer is this file, mapped, and nothing is woven.
#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "strips.h"
#include "traits.h"

#include "../sysroot/pw.h"

#include <cstring>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

ggml_backend_buffer_type_t pw_repack_buffer_type(void);

namespace {

constexpr size_t ALIGNMENT = 64;

// What the load under way repacks; loads come one after another.
struct {
    std::string path;  // of the file the host has given, or empty
    void *      data;  // of the last buffer
    size_t      size;
    int         n_buffers;
    bool        is_mapped;
} repacked;

struct strip_traits : ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        size = pw_strip_work_bytes(op);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        pw_multiply_strips(params, op);
        return true;
    }
};

// Whether weights, or what they are a view of, are in a buffer of ours. Strips have no place for views.
bool is_ours(const ggml_tensor * weights) {
    const ggml_backend_buffer_t buffer = weights->view_src ? weights->view_src->buffer : weights->buffer;
    return buffer && buffer->buft == pw_repack_buffer_type();
}

struct strip_buffer_type : ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * y = op->src[1];
        return op->op == GGML_OP_MUL_MAT && is_ours(op->src[0]) && pw_strip_format(op->src[0]) && y->type == GGML_TYPE_F32 &&
               (!y->buffer || ggml_backend_buft_is_host(y->buffer->buft));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (!op->src[0] || !is_ours(op->src[0])) {
            return nullptr;
        }
        GGML_ASSERT(op->op == GGML_OP_MUL_MAT && op->src[0]->extra && "repacked weights are only multiplied with");
        return static_cast<ggml::cpu::tensor_traits *>(op->src[0]->extra);
    }
};

enum ggml_status init_tensor(ggml_backend_buffer_t, ggml_tensor * tensor) {
    static strip_traits traits;
    tensor->extra = pw_strip_format(tensor) ? &traits : nullptr;
    return GGML_STATUS_SUCCESS;
}

// Whole tensors only: parts of one have no place of their own.
const strip_format * whole(const ggml_tensor * tensor, size_t offset, size_t size) {
    const strip_format * format = pw_strip_format(tensor);
    GGML_ASSERT(format && offset == 0 && size == ggml_nbytes(tensor) && "repacked weights are read and written whole");
    return format;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const strip_format * format = whole(tensor, offset, size);
    uint8_t * const      strips = static_cast<uint8_t *>(tensor->data);
    const size_t         bytes  = pw_strip_bytes(format, tensor);
    pw_weave(format, tensor, strips, static_cast<uint8_t *>(const_cast<void *>(data)), true);
    memset(strips + bytes, 0, GGML_PAD(bytes, ALIGNMENT) - bytes);  // so that nothing else is kept with them
}

// A mapped buffer holds all of it already.
void keep_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void *, size_t offset, size_t size) {
    whole(tensor, offset, size);
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    const strip_format * format = whole(tensor, offset, size);
    pw_weave(format, tensor, static_cast<uint8_t *>(tensor->data), static_cast<uint8_t *>(data), false);
}

const char * name(ggml_backend_buffer_type_t) {
    return "CPU_REPACK";
}

void unmap_buffer(ggml_backend_buffer_t buffer) {
    munmap(ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer));
}

// The host's file, if it has given one of that size; null otherwise.
void * map_file(size_t size) {
    const int fd   = repacked.path.empty() ? -1 : open(repacked.path.c_str(), O_RDONLY);
    void *    data = MAP_FAILED;
    if (fd >= 0 && lseek(fd, 0, SEEK_END) == static_cast<off_t>(size)) {
        data = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    }
    if (fd >= 0) {
        close(fd);
    }
    return data == MAP_FAILED ? nullptr : data;
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    void * const          mapped = map_file(size);
    ggml_backend_buffer_t buffer = mapped ? ggml_backend_cpu_buffer_from_ptr(mapped, size)
                                          : ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (!buffer) {
        return nullptr;
    }
    buffer->buft              = type;
    buffer->iface.init_tensor = init_tensor;
    buffer->iface.set_tensor  = mapped ? keep_tensor : set_tensor;
    buffer->iface.get_tensor  = get_tensor;
    buffer->iface.cpy_tensor  = nullptr;
    if (mapped) {
        buffer->iface.free_buffer = unmap_buffer;
    }
    repacked.data      = ggml_backend_buffer_get_base(buffer);
    repacked.size      = size;
    repacked.is_mapped = mapped != nullptr;
    repacked.n_buffers++;
    return buffer;
}

size_t alignment(ggml_backend_buffer_type_t) {
    return ALIGNMENT;
}

size_t alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const strip_format * format = pw_strip_format(tensor);
    return format ? pw_strip_bytes(format, tensor) : ggml_nbytes(tensor);
}

}  // namespace

ggml_backend_buffer_type_t pw_repack_buffer_type(void) {
    static strip_buffer_type        strips;
    static ggml_backend_buffer_type type = {
        /* .iface   = */ {
            /* .get_name       = */ name,
            /* .alloc_buffer   = */ alloc_buffer,
            /* .alloc_buffer_n = */ nullptr,
            /* .get_alignment  = */ alignment,
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ alloc_size,
            /* .get_alloc_size_n = */ nullptr,
            /* .is_host        = */ nullptr,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ &strips,
    };
    return &type;
}

// Before a load: the guest path of a file with the buffer of an earlier load of the same model, or an empty text.
extern "C" PW_EXPORTED(pw_repack_begin) void pw_repack_begin(const char * path) {
    repacked      = {};
    repacked.path = path;
}

// After a load: 0 when nothing was repacked, or into several buffers; 1 for a buffer that was woven and 2 for one that was
// mapped, with its address and size in out[0] and out[1].
extern "C" PW_EXPORTED(pw_repack_end) int32_t pw_repack_end(uint32_t out[2]) {
    if (repacked.n_buffers != 1) {
        return 0;
    }
    out[0] = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(repacked.data));
    out[1] = static_cast<uint32_t>(repacked.size);
    return repacked.is_mapped ? 2 : 1;
}
