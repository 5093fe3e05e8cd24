// Force-included into llama-mmap.cpp: the runtime has mmap (mmap.c) and knows why it cannot mlock, WASI's headers do not say so.
#pragma once
#include <sys/resource.h>
#include <unistd.h>
#define _POSIX_MAPPED_FILES 200809L
#define _POSIX_MEMLOCK_RANGE 200809L
struct rlimit { unsigned long long rlim_cur, rlim_max; };
#define RLIMIT_MEMLOCK 8
extern "C" int getrlimit(int, struct rlimit *);
