/* cards.h - network cards and udev: see cards.c. */
#ifndef CARDS_H
#define CARDS_H

/* Waits until udev is through with the cards, for some seconds; always 0. */
int await_cards(void);

#endif
