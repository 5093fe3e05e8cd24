// common/arg.cpp takes any platform that is neither Linux, Windows nor AIX for a BSD and asks for this header.
#pragma once
#include <limits.h>
