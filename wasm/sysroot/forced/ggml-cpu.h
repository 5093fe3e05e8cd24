// Force-included into ggml-cpu.c. Upstream allows one thread only where __wasi__ is defined: our runtime has threads, so
// the macro goes once every header that needs it has been read. The barrier's spin calls nothing: its relax becomes ours.
#pragma once
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#undef __wasi__
void pw_relax(void);
#define ggml_thread_cpu_relax(x) PW_RELAX_##x
#define PW_RELAX_void pw_relax_unused(void)
#define PW_RELAX_ pw_relax()
