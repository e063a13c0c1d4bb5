/* stage.c - has a stage of cloud-init run by the program that was loaded once for all of them.
 *
 * cloud-init 22.4 is a Python program of four runs, and under emulation half of what a first boot costs is loading it
 * four times. vmctl-cloud-init.service loads it and waits; each stage's service, in its place of the boot as ever, has
 * this ask it for a fork. Where it does not answer, or the stages are long over, the stage is a cloud-init of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "stage.h"

#define PROGRAM "/usr/bin/cloud-init"

/* The words with this process's standard files; -1 if nobody took them, else the exit code. */
static int ask(char **words)
{
    struct sockaddr_un place = {.sun_family = AF_UNIX, .sun_path = STAGES_SOCKET};
    char text[512];
    size_t length = 0;
    for (; *words && length + strlen(*words) + 1 < sizeof text; words++)
        length = (size_t)(stpcpy(text + length, *words) - text) + 1;
    int door = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), files[3] = {0, 1, 2};
    if (*words || door < 0 || connect(door, (struct sockaddr *)&place, sizeof place) != 0) {
        if (door >= 0)
            close(door);
        return -1;
    }
    union {
        char room[CMSG_SPACE(sizeof files)];
        struct cmsghdr aligned;
    } control = {0};
    struct iovec part = {text, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room,
                             .msg_controllen = sizeof control.room};
    struct cmsghdr *carried = CMSG_FIRSTHDR(&message);
    carried->cmsg_level = SOL_SOCKET;
    carried->cmsg_type = SCM_RIGHTS;
    carried->cmsg_len = CMSG_LEN(sizeof files);
    memcpy(CMSG_DATA(carried), files, sizeof files);
    if (sendmsg(door, &message, MSG_NOSIGNAL) != (ssize_t)length) {
        close(door);
        return -1;
    }
    unsigned char code;
    ssize_t got;
    while ((got = read(door, &code, 1)) < 0 && errno == EINTR)
        ;
    close(door);
    return got == 1 ? code : 1; /* begun and not ended: not to be done twice */
}

int stage(char **words)
{
    int code = ask(words);
    if (code >= 0)
        return code;
    words[-1] = PROGRAM;
    execv(PROGRAM, words - 1);
    perror(PROGRAM);
    return 127;
}
