//! Machine code that runs inside tracees, x86_64. It is position-independent and touches
//! no memory but its own page and the table that it is given.
#![allow(unsafe_code)]

core::arch::global_asm!(
    r#"
// The batch interpreter. rbx: next entry, r12: entries left, r13: the table, r14: where to go
// in the end, r15: an entry to run in the end whatever happened, or 0.
.globl lmrun_batch
.globl lmrun_batch_end
lmrun_batch:
1:  test r12, r12
    jz 4f
    movzx ecx, byte ptr [rbx+5]
    test ecx, ecx
    jz 2f
    movzx eax, word ptr [rbx+6]
    shl eax, 6
    mov rax, [r13+rax+56]
    mov [rbx+rcx*8], rax
2:  mov eax, [rbx]
    mov rdi, [rbx+8]
    mov rsi, [rbx+16]
    mov rdx, [rbx+24]
    mov r10, [rbx+32]
    mov r8, [rbx+40]
    mov r9, [rbx+48]
    syscall
    mov [rbx+56], rax
    test byte ptr [rbx+4], 1
    jz 3f
    cmp rax, -4095
    jae 4f
3:  add rbx, 64
    dec r12
    jmp 1b
4:  mov rbx, r15
    xor r15d, r15d
    mov r12d, 1
    test rbx, rbx
    jnz 2b
    jmp r14
lmrun_batch_end:

// A slot: a `syscall` to borrow a task with, followed by what gives the task back its own context
// if nobody takes control any more. Undoes the call that was under way, if it left anything.
.globl lmrun_slot
.globl lmrun_slot_back
.globl lmrun_slot_context
.globl lmrun_slot_end
lmrun_slot:
    syscall
lmrun_slot_back:
    mov rdi, rax
    mov eax, [rip+lmrun_undo_nr]
    mov rsi, [rip+lmrun_undo_arg]
    syscall
    mov eax, 14
    mov edi, 2
    lea rsi, [rip+lmrun_all_signals]
    xor edx, edx
    mov r10d, 8
    syscall
    lea rsp, [rip+lmrun_flags]
    popfq
    mov rsp, [rip+lmrun_rsp]
    mov eax, 14
    mov edi, 2
    lea rsi, [rip+lmrun_mask]
    mov edx, 0
    mov r10d, 8
    syscall
    mov rax, [rip+lmrun_rax]
    mov rbx, [rip+lmrun_rbx]
    mov rcx, [rip+lmrun_rcx]
    mov rdx, [rip+lmrun_rdx]
    mov rsi, [rip+lmrun_rsi]
    mov rdi, [rip+lmrun_rdi]
    mov rbp, [rip+lmrun_rbp]
    mov r8, [rip+lmrun_r8]
    mov r9, [rip+lmrun_r9]
    mov r10, [rip+lmrun_r10]
    mov r11, [rip+lmrun_r11]
    mov r12, [rip+lmrun_r12]
    mov r13, [rip+lmrun_r13]
    mov r14, [rip+lmrun_r14]
    mov r15, [rip+lmrun_r15]
    jmp [rip+lmrun_rip]
.balign 8
lmrun_slot_context:
    .quad 0 // magic
    .quad 0 // generation
lmrun_undo_nr: .quad 0
lmrun_undo_arg: .quad 0
lmrun_all_signals: .quad -1
lmrun_mask: .quad 0
lmrun_flags: .quad 0
lmrun_rip: .quad 0
lmrun_rsp: .quad 0
lmrun_rax: .quad 0
lmrun_rbx: .quad 0
lmrun_rcx: .quad 0
lmrun_rdx: .quad 0
lmrun_rsi: .quad 0
lmrun_rdi: .quad 0
lmrun_rbp: .quad 0
lmrun_r8: .quad 0
lmrun_r9: .quad 0
lmrun_r10: .quad 0
lmrun_r11: .quad 0
lmrun_r12: .quad 0
lmrun_r13: .quad 0
lmrun_r14: .quad 0
lmrun_r15: .quad 0
lmrun_slot_end:
"#
);

unsafe extern "C" {
    static lmrun_batch: u8;
    static lmrun_batch_end: u8;
    static lmrun_slot: u8;
    static lmrun_slot_back: u8;
    static lmrun_slot_context: u8;
    static lmrun_slot_end: u8;
}

fn between(start: &'static u8, end: &'static u8) -> &'static [u8] {
    let (s, e) = (std::ptr::from_ref(start), std::ptr::from_ref(end));
    // SAFETY: both are labels of one contiguous piece of .text above, `end` behind `start`.
    unsafe { std::slice::from_raw_parts(s, e as usize - s as usize) }
}

/// The batch interpreter.
pub fn batch() -> &'static [u8] {
    // SAFETY: the labels exist; only their addresses are used.
    unsafe { between(&lmrun_batch, &lmrun_batch_end) }
}

/// A slot with an empty context.
pub fn slot() -> &'static [u8] {
    // SAFETY: as above.
    unsafe { between(&lmrun_slot, &lmrun_slot_end) }
}

/// Offset in a slot of the routine that gives the task back.
pub fn slot_back() -> u64 {
    // SAFETY: as above.
    unsafe { between(&lmrun_slot, &lmrun_slot_back).len() as u64 }
}

/// Offset in a slot of its context: u64s in the order of the listing.
pub fn slot_context() -> usize {
    // SAFETY: as above.
    unsafe { between(&lmrun_slot, &lmrun_slot_context).len() }
}

/// `syscall; int3`: what a puppet's single calls run on.
pub const SYSCALL_TRAP: [u8; 3] = [0x0f, 0x05, 0xcc];
