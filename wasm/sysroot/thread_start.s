# pw_thread_start(tid, header): the first code of a guest thread, run by the host on an instance of its own.
# It stands outside C because the new instance has neither stack pointer nor TLS base yet, and because the last two
# instructions must not touch the thread's stack: the joiner frees it as soon as `running` reads 0.
.globaltype __stack_pointer, i32
.globaltype __tls_base, i32
.functype pw_thread_main (i32) -> ()

.section .text.pw_thread_start,"",@
.globl pw_thread_start
.type pw_thread_start,@function
.export_name pw_thread_start, pw_thread_start
pw_thread_start:
	.functype pw_thread_start (i32, i32) -> ()
	local.get 1
	i32.load 0
	global.set __stack_pointer
	local.get 1
	i32.load 4
	global.set __tls_base
	local.get 1
	call pw_thread_main
	local.get 1
	i32.const 0
	i32.atomic.store 8
	local.get 1
	i32.const -1
	memory.atomic.notify 8
	drop
	end_function

# The tag of C++ exceptions: one per module, declared by clang in every object that throws or catches.
.tagtype __cpp_exception i32
.globl __cpp_exception
__cpp_exception:
