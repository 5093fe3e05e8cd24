// Force-included into musl's __fdopen.c: a model's header, some megabytes of short strings, is read in pieces of the size of
// the buffer, and each is a call of the host. musl's 1024 bytes make that a tenth of a load.
#pragma once
#include <stdio.h>
#undef BUFSIZ
#define BUFSIZ 65536
