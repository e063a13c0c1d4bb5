/* From a start-up interrupt to 64-bit C: the second CPU begins in real mode, at the page the interrupt names.
 *
 * Position-independent by force: it is copied to 0x8000, and what it refers to is at fixed addresses below 4 GiB.
 * Paging and protection go on at once, which leads straight from real mode into long mode.
 */
        .text
        .code16
        .globl  startup, startup_end
startup:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movl    $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER */
        rdmsr
        orl     $0x100, %eax            /* LME */
        wrmsr
        movl    %cr0, %eax
        andl    $0x9fffffff, %eax       /* caches on: CD and NW are set after INIT */
        orl     $0x80000001, %eax       /* PG, PE */
        lgdtl   0x8000 + (table - startup)
        movl    %eax, %cr0
        ljmpl   $0x08, $other64
table:  .word   0x47
        .long   gdt
startup_end:

        .code64
other64:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movq    $other_stack_top, %rsp
        call    other_main

        .bss
        .align  16
        .skip   8192
other_stack_top:

        .section .note.GNU-stack, "", @progbits
