/* stage.h - stages of cloud-init by a program that is loaded once: see stage.c. */
#ifndef STAGE_H
#define STAGE_H

#define STAGES_SOCKET "/run/vmctl-cloud-init"

/* Runs the stage that the words (the last one NULL, and room for one before the first) ask for; its exit code. */
int stage(char **words);

#endif
