/* From QEMU's hands to 64-bit C.
 *
 * QEMU starts a 64-bit ELF that has a PVH note (owner "Xen", type 18) at the 32-bit address the note names:
 * protected mode, paging off, flat segments, interrupts off. (Xen's docs/misc/pvh.pandoc; QEMU, hw/i386/x86.c.)
 * No multiboot header beside it: QEMU would try that first and then refuse a 64-bit ELF.
 */
        .section .note.pvh, "a", @note
        .align  4
        .long   4, 4, 18                /* sizes of name and descriptor; XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .long   entry32

        .text
        .code32
        .globl  entry32
entry32:
        cld
        movl    $stack_top, %esp
        movl    %ebx, start_info

        /* One table of each level: the first GiB, identity mapped in 2 MiB pages, open to CPL 3 as well. */
        movl    $(pdpt + 7), pml4
        movl    $(pd + 7), pdpt
        movl    $pd, %edi
        movl    $0x87, %eax             /* present, writable, user, large */
        movl    $512, %ecx
1:      movl    %eax, (%edi)
        movl    $0, 4(%edi)
        addl    $0x200000, %eax
        addl    $8, %edi
        loop    1b

        movl    %cr4, %eax
        orl     $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER */
        rdmsr
        orl     $0x100, %eax            /* LME */
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax       /* PG, PE */
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $0x08, $entry64

        .code64
entry64:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        xorl    %eax, %eax
        movw    %ax, %fs
        movw    %ax, %gs
        movq    $stack_top, %rsp
        call    guest_main
2:      hlt
        jmp     2b

/* Interrupt stubs: 16 bytes each, so that stub N is at stubs + 16 * N. Each leaves an error code and the vector. */
        .align  16
        .globl  stubs
stubs:
        .set    vector, 0
        .rept   256
        .align  16
        .if     (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17)
        .else
        pushq   $0
        .endif
        pushq   $vector
        jmp     common
        .set    vector, vector + 1
        .endr

common:
        pushq   %rax
        pushq   %rcx
        pushq   %rdx
        pushq   %rbx
        pushq   %rbp
        pushq   %rsi
        pushq   %rdi
        pushq   %r8
        pushq   %r9
        pushq   %r10
        pushq   %r11
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, %rdi
        cld
        call    trap
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %r11
        popq    %r10
        popq    %r9
        popq    %r8
        popq    %rdi
        popq    %rsi
        popq    %rbp
        popq    %rbx
        popq    %rdx
        popq    %rcx
        popq    %rax
        addq    $16, %rsp               /* vector and error code */
        iretq

/* void at_cpl3(void (*code)(void)): run code at CPL 3 on a stack of its own, until it does int 0x80. */
        .globl  at_cpl3
at_cpl3:
        pushq   %rbx
        pushq   %rbp
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, kernel_rsp
        pushq   $0x1b                   /* user data */
        pushq   $user_stack_top
        pushq   user_flags
        pushq   $0x23                   /* user code */
        pushq   %rdi
        iretq

/* void leave_cpl3(void): from the handler of int 0x80, back to who called at_cpl3. */
        .globl  leave_cpl3
leave_cpl3:
        movq    kernel_rsp, %rsp
        movw    $0x10, %ax              /* the CPU made it null on the way here; QEMU's far calls look at it */
        movw    %ax, %ss
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbp
        popq    %rbx
        ret

        .data
        .align  16
        .globl  user_flags
user_flags:
        .quad   0x2                     /* interrupts stay off */
        .globl  gdt
gdt:    .quad   0
        .quad   0x00af9a000000ffff      /* 08: kernel code, 64 bit */
        .quad   0x00cf92000000ffff      /* 10: kernel data */
        .quad   0x00cff2000000ffff      /* 18: user data */
        .quad   0x00affa000000ffff      /* 20: user code, 64 bit */
        .quad   0, 0                    /* 28: task state segment, filled in by C */
        .quad   0x00cf9a000000ffff      /* 38: kernel code, 32 bit */
        .quad   0x00cffa000000ffff      /* 40: user code, 32 bit */
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt

        .bss
        .align  4096
        .globl  pml4, pdpt
pml4:   .skip   4096
pdpt:   .skip   4096
pd:     .skip   4096
        .skip   16384
stack_top:
        .skip   8192
user_stack_top:
        .skip   8192
        .globl  trap_stack_top
trap_stack_top:
kernel_rsp:
        .skip   8
        .globl  start_info
start_info:
        .skip   8

        .section .note.GNU-stack, "", @progbits
