// Force-included into common: macros of a template that call themselves without end fail before the stack does.
//
// Every call of a macro, and every block of one, makes a scope (jinja::context), and a new scope asks for the time. That is the
// one place where upstream lets us look how deep the calls are.
#pragma once
#ifdef __cplusplus
#include <ctime>

namespace std {
time_t time_of_scope(time_t * now);   // glue/jinja_depth.cpp; throws std::runtime_error
}
#define time(...) time_of_scope(__VA_ARGS__)
#endif
