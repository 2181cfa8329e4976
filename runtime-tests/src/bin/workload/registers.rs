//! Threads that keep known values in every register and compare them all the time.

use std::arch::global_asm;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::kernel::noise;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, same};

pub const WORKLOADS: &[(&str, Setup)] =
    &[("registers-general", general), ("registers-avx", avx), ("registers-avx512", avx512), ("registers-fpu", fpu)];

/// What a spinning thread shares with the others; the assembly below knows the offsets.
#[repr(C, align(64))]
struct Spin {
    /// 0 while it is to go on.
    stop: AtomicU32,
    _pad: u32,
    /// Comparisons done.
    turns: AtomicU64,
    /// What the registers are to hold.
    values: [u8; 4096],
}

unsafe extern "C" {
    fn spin_general(spin: *const Spin) -> u64;
    fn spin_avx(spin: *const Spin) -> u64;
    fn spin_avx512(spin: *const Spin) -> u64;
    fn spin_fpu(spin: *const Spin, scratch: *mut [u8; 512]) -> u64;
}

// Each returns 0 when it was stopped, else which register (from 1) did not hold its value.
// `values` begins at offset 16 of `Spin`.
global_asm!(
    r#"
    .globl spin_general
spin_general:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 8
    mov rax, [rdi + 16]
    mov rbx, [rdi + 24]
    mov rcx, [rdi + 32]
    mov rdx, [rdi + 40]
    mov rsi, [rdi + 48]
    mov rbp, [rdi + 56]
    mov r8,  [rdi + 64]
    mov r9,  [rdi + 72]
    mov r10, [rdi + 80]
    mov r11, [rdi + 88]
    mov r12, [rdi + 96]
    mov r13, [rdi + 104]
    mov r14, [rdi + 112]
    mov r15, [rdi + 120]
    std
2:
    cmp rax, [rdi + 16]
    jne 3f
    cmp rbx, [rdi + 24]
    jne 3f
    cmp rcx, [rdi + 32]
    jne 3f
    cmp rdx, [rdi + 40]
    jne 3f
    cmp rsi, [rdi + 48]
    jne 3f
    cmp rbp, [rdi + 56]
    jne 3f
    cmp r8,  [rdi + 64]
    jne 3f
    cmp r9,  [rdi + 72]
    jne 3f
    cmp r10, [rdi + 80]
    jne 3f
    cmp r11, [rdi + 88]
    jne 3f
    cmp r12, [rdi + 96]
    jne 3f
    cmp r13, [rdi + 104]
    jne 3f
    cmp r14, [rdi + 112]
    jne 3f
    cmp r15, [rdi + 120]
    jne 3f
    pushfq
    test qword ptr [rsp], 0x400
    lea rsp, [rsp + 8]
    jz 4f
    inc qword ptr [rdi + 8]
    cmp dword ptr [rdi], 0
    je 2b
    xor eax, eax
    jmp 5f
3:
    mov eax, 1
    jmp 5f
4:
    mov eax, 2
5:
    cld
    add rsp, 8
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .globl spin_avx
spin_avx:
    lea rsi, [rdi + 16]
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14
    vmovdqu ymm\n, [rsi + 32*\n]
    .endr
2:
    mov eax, 1
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14
    vpxor ymm15, ymm\n, [rsi + 32*\n]
    vptest ymm15, ymm15
    jnz 3f
    inc eax
    .endr
    inc qword ptr [rdi + 8]
    cmp dword ptr [rdi], 0
    je 2b
    xor eax, eax
3:
    vzeroupper
    ret

    .globl spin_avx512
spin_avx512:
    lea rsi, [rdi + 16]
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vmovdqu64 zmm\n, [rsi + 64*\n]
    .endr
    .irp n, 1,2,3,4,5,6,7
    kmovq k\n, [rsi + 2048 + 8*\n]
    .endr
2:
    mov eax, 1
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    vpcmpd k0, zmm\n, [rsi + 64*\n], 4
    kortestw k0, k0
    jnz 3f
    inc eax
    .endr
    .irp n, 1,2,3,4,5,6,7
    kmovq rcx, k\n
    cmp rcx, [rsi + 2048 + 8*\n]
    jne 3f
    inc eax
    .endr
    inc qword ptr [rdi + 8]
    cmp dword ptr [rdi], 0
    je 2b
    xor eax, eax
3:
    vzeroupper
    ret

    .globl spin_fpu
spin_fpu:
    sub rsp, 24
    stmxcsr [rsp]
    fnstcw [rsp + 4]
    fninit
    mov word ptr [rsp + 8], 0x0e7f
    fldcw [rsp + 8]
    mov dword ptr [rsp + 8], 0xffa0
    ldmxcsr [rsp + 8]
    fldpi
    fldl2e
    fldln2
    fld1
    fldl2t
    fxsave64 [rdi + 16]
    lea r8, [rdi + 16]
2:
    fxsave64 [rsi]
    mov eax, [rsi]
    cmp eax, [r8]
    jne 3f
    mov eax, [rsi + 24]
    cmp eax, [r8 + 24]
    jne 4f
    mov ecx, 32
6:
    mov rax, [rsi + rcx]
    cmp rax, [r8 + rcx]
    jne 5f
    add ecx, 8
    cmp ecx, 112
    jne 6b
    inc qword ptr [rdi + 8]
    cmp dword ptr [rdi], 0
    je 2b
    xor eax, eax
    jmp 7f
3:
    mov eax, 1
    jmp 7f
4:
    mov eax, 2
    jmp 7f
5:
    mov eax, 3
7:
    fninit
    fldcw [rsp + 4]
    ldmxcsr [rsp]
    add rsp, 24
    ret
"#
);

/// Two threads spin, each with its own values. A check demands that both go on, and that neither saw a difference.
fn spin(what: &'static str, run: impl Fn(&Spin) -> u64 + Send + Copy + 'static) -> Fallible<Check> {
    let spins: Vec<&'static Spin> = (1..=2u64)
        .map(|seed| {
            let values = noise(seed, 4096).try_into().expect("4096 bytes of noise");
            let spin = Spin { stop: AtomicU32::new(0), _pad: 0, turns: AtomicU64::new(0), values };
            &*Box::leak(Box::new(spin))
        })
        .collect();
    let wrong: &'static AtomicU64 = Box::leak(Box::default());
    for spin in &spins {
        let spin: &'static Spin = spin;
        std::thread::spawn(move || wrong.store(run(spin), Ordering::SeqCst));
    }
    let go_on = move || {
        for spin in &spins {
            let before = spin.turns.load(Ordering::Relaxed);
            eventually(what, || spin.turns.load(Ordering::Relaxed) > before || wrong.load(Ordering::SeqCst) != 0)?;
        }
        same(format!("{what}: number of the register that changed"), 0, wrong.load(Ordering::SeqCst))
    };
    go_on()?;
    Ok(Box::new(go_on))
}

fn general(_: &mut Stage) -> Fallible<Check> {
    spin("general registers and the direction flag (2)", |s| unsafe { spin_general(s) })
}

fn avx(_: &mut Stage) -> Fallible<Check> {
    if !std::is_x86_feature_detected!("avx2") {
        return Err("skip: no AVX2".into());
    }
    spin("ymm registers", |s| unsafe { spin_avx(s) })
}

fn avx512(_: &mut Stage) -> Fallible<Check> {
    if !std::is_x86_feature_detected!("avx512bw") {
        return Err("skip: no AVX-512".into());
    }
    spin("zmm registers (from 33: k1 to k7)", |s| unsafe { spin_avx512(s) })
}

fn fpu(_: &mut Stage) -> Fallible<Check> {
    #[repr(align(64))]
    struct Scratch([u8; 512]);
    spin("x87 control and status (1), MXCSR (2), x87 stack (3)", |s| {
        let mut scratch = Scratch([0; 512]);
        unsafe { spin_fpu(s, &mut scratch.0) }
    })
}
