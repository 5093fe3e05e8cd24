// One of everything the generator must understand. Its layout is worked out by hand in test_abi_header.py.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define DEPRECATED(func, hint) func __attribute__((deprecated(hint)))

#define LLAMA_PLANT_MAGIC 0x67676c61u
#define LLAMA_PLANT_FLAGS (LLAMA_PLANT_SHIFT << 2 | 1)
#define LLAMA_PLANT_SHIFT 3
#define LLAMA_PLANT_NONE -1
#define LLAMA_PLANT_KEY "plant.key"
#define LLAMA_PLANT_CALL(x) (x)
#define LLAMA_PLANT_ATTRIBUTE __attribute__((unused))

struct plant_opaque;

enum plant_kind { LLAMA_PLANT_KIND_A, LLAMA_PLANT_KIND_B = 5, LLAMA_PLANT_KIND_C };
enum plant_signed { LLAMA_PLANT_SIGNED_LOW = -2, LLAMA_PLANT_SIGNED_NEXT };

typedef int32_t plant_id;
typedef struct { uint16_t bits; } plant_half;
typedef struct plant_opaque * plant_handle;

// Asked now and then. False ends the work.
typedef bool (*plant_progress)(float fraction, void * user_data);

struct plant_inner {
    char   tag;
    double weight;
};

typedef struct plant_outer {
    bool                flag;
    struct plant_inner  inner;
    char                name[5];
    int16_t             shorts[3];
    plant_id            id;
    union {
        int64_t whole;
        float   part;
    };
    struct {
        uint8_t low;
        plant_id high;
    } pair;
    struct plant_outer * next;
    plant_progress      progress;
    void             (* slot)(struct plant_outer * self, void * user_data);
    plant_half          halves[2];
    size_t              size;
} plant_outer;

// Make one from its parts. A second sentence.
struct plant_outer plant_make(plant_half half, enum plant_kind kind, bool flag);

int64_t plant_sum(const struct plant_outer * outer, uint64_t start, double weight, float scale); // adds it all up

// A banner that belongs to nobody

const char * plant_name(plant_handle handle, const char * fallback, const char ** all);

enum plant_signed plant_write(FILE * file, struct plant_outer outer, plant_progress progress, void * user_data);

DEPRECATED(void plant_old(unsigned char c, int8_t i), "use plant_make");

static inline int plant_inline(void) { return 0; }
