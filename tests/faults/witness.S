# A guest that knows what it has written: to 8 MiB of memory, and to 32 sectors of its disk. It runs for ever.
#
# A hundred times a second it wakes, looks whether PAGES pages still hold what it wrote to them last, and writes to them
# anew; and every third time it does the same with a sector. What a sector must hold is a number that it took from the
# time and keeps in memory: a guest whose memory is older than its disk, or beside which another one writes to that
# disk, sees it. What it has found, others read at STATE:
#   0 "WITN"   4 passes over memory   8 what is wrong   12 where   16 what should be there   20 what is   24 sectors written
# What is wrong: 1, 2 the first, the last word of a page; 3, 4 a sector; 5 the disk reports an error.
.set STATE, 0x9000
.set TABLE, 0xa000
.set FIRST, 0x800000
.set END, 0x1000000
.set PAGES, 20
.set SECTORS, 32
.set BEGIN, 2048             # the first of these sectors
.set BUFFER, 0xb000

.code16
.globl _start
_start:
    ljmp $0, $1f
1:  cli
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    mov $0x0203, %ax         # three sectors more
    mov $0x0002, %cx
    xor %dh, %dh
    mov $0x7e00, %bx
    int $0x13
    cli
    in $0x92, %al
    or $2, %al
    out %al, $0x92
    lgdt gdt_pointer
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmp $8, $protected

.balign 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
idt_pointer:
    .word 0x21 * 8 - 1
    .long 0x8800

.org 510
    .word 0xaa55

.code32
protected:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x7c00, %esp
    cld
    mov $STATE, %edi         # state, table and buffer
    xor %eax, %eax
    mov $0x1000, %ecx
    rep stosl
    mov $FIRST, %esi
fill:
    mov %esi, %eax
    mov %eax, (%esi)
    not %eax
    mov %eax, 4092(%esi)
    add $4096, %esi
    cmp $END, %esi
    jb fill

    mov $tick, %eax          # interrupt 0x20: the timer
    mov %ax, 0x8900
    movw $8, 0x8902
    movw $0x8e00, 0x8904
    shr $16, %eax
    mov %ax, 0x8906
    lidt idt_pointer
    mov $0x11, %al
    out %al, $0x20
    out %al, $0xa0
    mov $0x20, %al
    out %al, $0x21
    mov $0x28, %al
    out %al, $0xa1
    mov $4, %al
    out %al, $0x21
    mov $2, %al
    out %al, $0xa1
    mov $1, %al
    out %al, $0x21
    out %al, $0xa1
    mov $0xfe, %al
    out %al, $0x21
    mov $0xff, %al
    out %al, $0xa1
    mov $0x34, %al
    out %al, $0x43
    mov $11932 & 0xff, %al
    out %al, $0x40
    mov $11932 >> 8, %al
    out %al, $0x40

    mov $FIRST, %esi         # the next page; stays here
    xor %ebx, %ebx           # the next sector
    xor %ebp, %ebp           # times it woke
    movl $0x4e544957, STATE
    sti
wake:
    hlt
    mov %cr4, %eax           # forget translations: QEMU's TCG does not see writes through those that it made before it
    xor $0x80, %eax          # last looked which pages have changed, and would not send them again
    mov %eax, %cr4
    mov $PAGES, %ecx
page:
    mov STATE + 4, %eax
    xor %esi, %eax
    mov (%esi), %edx
    mov $1, %edi
    cmp %eax, %edx
    jne wrong
    not %eax
    mov 4092(%esi), %edx
    mov $2, %edi
    cmp %eax, %edx
    jne wrong
    mov STATE + 4, %eax
    inc %eax
    xor %esi, %eax
    mov %eax, (%esi)
    not %eax
    mov %eax, 4092(%esi)
    add $4096, %esi
    cmp $END, %esi
    jb 1f
    incl STATE + 4
    mov $FIRST, %esi
1:  loop page

    inc %ebp
    cmp $3, %ebp
    jb wake
    xor %ebp, %ebp
    push %esi
    cmpl $0, TABLE(, %ebx, 4)
    je write
    mov $0x20, %al           # read sectors
    call command
    mov $BUFFER, %edi
    mov $0x1f0, %edx
    mov $256, %ecx
    rep insw
    mov TABLE(, %ebx, 4), %eax
    mov %ebx, %esi
    mov BUFFER, %edx
    mov $3, %edi
    cmp %eax, %edx
    jne wrong
    not %eax
    xor %ebx, %eax
    mov BUFFER + 508, %edx
    mov $4, %edi
    cmp %eax, %edx
    jne wrong
write:
    rdtsc
    or $1, %eax
    mov %eax, TABLE(, %ebx, 4)
    mov $BUFFER, %edi
    mov $127, %ecx
    rep stosl
    not %eax
    xor %ebx, %eax
    stosl
    mov $0x30, %al           # write sectors
    call command
    mov $BUFFER, %esi
    mov $0x1f0, %edx
    mov $256, %ecx
    rep outsw
    call done
    incl STATE + 24
    inc %ebx
    and $SECTORS - 1, %ebx
    pop %esi
    jmp wake

command:                     # of one sector, %ebx of ours; returns when data can be moved
    push %eax
    call done
    mov $0x1f2, %edx
    mov $1, %al
    out %al, %dx
    inc %edx
    lea BEGIN(%ebx), %eax
    out %al, %dx
    inc %edx
    shr $8, %eax
    out %al, %dx
    inc %edx
    xor %eax, %eax
    out %al, %dx
    inc %edx
    mov $0xe0, %al
    out %al, %dx
    inc %edx
    pop %eax
    out %al, %dx
1:  in %dx, %al
    test $0x80, %al
    jnz 1b
    test $0x21, %al
    jnz failed
    test $8, %al
    jz 1b
    ret
done:
    mov $0x1f7, %edx
1:  in %dx, %al
    test $0x80, %al
    jnz 1b
    test $0x21, %al
    jnz failed
    ret
failed:
    movzx %al, %edx
    mov %ebx, %esi
    xor %eax, %eax
    mov $5, %edi
wrong:
    mov %esi, STATE + 12
    mov %eax, STATE + 16
    mov %edx, STATE + 20
    mov %edi, STATE + 8
    cli
1:  hlt
    jmp 1b

tick:
    push %eax
    mov $0x20, %al
    out %al, $0x20
    pop %eax
    iret
.org 2048
