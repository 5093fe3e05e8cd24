// Grammars that answers follow.
#pragma once

#include "llama.h"

#include <string>

// The grammar of a JSON schema as common's converter writes it, made to allow nothing that is no JSON, or no text.
std::string pw_harden_grammar(const std::string & grammar);

// llama_sampler_accept, which aborts on an end of generation that the grammar does not allow: this throws.
void pw_accept_checked(llama_sampler * grammar, const llama_vocab * vocab, llama_token token);

// The sampler beside a chain: a grammar that sleeps while the model reasons if it is lazy, what ends reasoning that is too long,
// and that all of it is UTF-8. Either may be null. Takes both over.
llama_sampler * pw_constraint_new(const llama_vocab * vocab, llama_sampler * grammar, llama_sampler * budget, bool is_lazy);
