// Force-included into common.cpp, which asks for thread priorities and the user's home.
#pragma once
#include <sys/resource.h>
#include <unistd.h>
#define PRIO_PROCESS 0
extern "C" int setpriority(int, unsigned, int);
extern "C" unsigned getuid(void);
