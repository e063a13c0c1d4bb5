/* What traps cost: each row does one thing again and again and says how long it took.
 *
 * The method: a row is a function, called through a pointer in a loop, as kvm-unit-tests' x86/vmexit does, so that
 * gross figures can be laid side by side; the row "loop" calls an empty one, and what remains after taking it off is
 * the net figure. The number of calls is doubled until a part is long enough to be timed; what that took is thrown
 * away. Then parts of that many calls are timed until the batch is complete, and each part is told as it is, in ticks of
 * the TSC. Statistics are made elsewhere, from these.
 *
 * Command line: rows=NAME,… (default all), part=MICROSECONDS, parts=N, clocks=NAME,…, slow=MS
 * Says: "row NAME", then "skip WHY", or "calls N", "asked NS" (of time that the row asks to pass) and "ticks T T T …", or
 * "wrong WHY"; last "done". A row that is begun and not ended was this guest's end.
 */
#include "clock.h"
#include "rows.h"

enum { MOST_PARTS = 200, FEWEST_PARTS = 5, LONGEST = 2, LOOKS = 4 };

static u64 part_ticks;
static u64 parts;

__attribute__((noinline, noclone)) static u64 timed(void (*once)(void), u64 calls) {
    u64 began = ticks();
    for (u64 i = 0; i < calls; i++)
        once();
    return ticks() - began;
}

/* The least of some looks, for each may have been disturbed; none is looked at twice that takes long. */
static u64 least_time(void (*once)(void), u64 calls) {
    u64 least = timed(once, calls);
    for (int i = 1; i < LOOKS && least < LOOKS * part_ticks; i++) {
        u64 took = timed(once, calls);
        if (took < least)
            least = took;
    }
    return least;
}

/* How many calls make a part. */
static u64 enough_calls(void (*once)(void)) {
    for (u64 calls = 1;; calls *= 2) {
        if (timed(once, calls) < part_ticks / 4)
            continue;
        u64 took = least_time(once, calls);
        if (took >= part_ticks / 8)
            return calls * part_ticks / took + 1;
    }
}

static u64 took[MOST_PARTS];

/* A batch, and how many parts it has: one whose parts turn out short goes on, one whose parts turn out long ends early. */
static u64 batch_of(const struct row *row, u64 calls, u64 *sum) {
    u64 count = 0, batch = parts * part_ticks;
    *sum = lost = 0;
    while (count < FEWEST_PARTS || (count < parts && *sum < LONGEST * batch) || (count < MOST_PARTS && *sum < batch)) {
        if (row->calls && count == row->parts())
            break;
        *sum += took[count++] = timed(row->once, calls);
    }
    return count;
}

static void measure(const struct row *row) {
    u64 sum, calls = row->calls ? row->calls : enough_calls(row->once);
    u64 count = batch_of(row, calls, &sum);
    /* Others had the CPU when the calls were counted: too few of them make a part. */
    while (!row->calls && !lost && sum < parts * part_ticks) {
        calls = calls * parts * part_ticks / sum + 1;
        count = batch_of(row, calls, &sum);
    }
    if (lost) {
        print("wrong ");
        print_number(lost);
        print(" interrupts did not come\n");
        return;
    }
    say("calls", calls);
    if (row->asked_ns)
        say("asked", row->asked_ns);
    print("ticks");
    for (u64 i = 0; i < count; i++) {
        print(" ");
        print_number(took[i]);
    }
    print("\n");
}

void guest_main(void) {
    print("vmctl-trap 1\n");
    pace();
    traps_init();
    map_devices();
    tell_cpu();
    if (ticks_count_instructions()) {
        print("refuse the TSC counts instructions (-icount), not time\n");
        say_goodbye();
    }
    struct clock clock = calibrate(option("clocks", "cpuid,kvmclock,hpet,pit"));
    print("clock ");
    print(*clock.source ? clock.source : "none");
    print(" ");
    print_number(clock.khz);
    print("\n");
    /* Without a clock the length of a batch is a guess; its reader is told, and finds the rate out from outside. */
    part_ticks = number_option("part", 500) * (clock.khz ? clock.khz : 2000000) / 1000;
    parts = number_option("parts", 100);
    if (!parts || parts > MOST_PARTS)
        parts = 100;
    rows_init();
    const char *wanted = option("rows", "");
    for (const struct row *row = rows; row->name; row++) {
        if (*wanted && !listed(row->name, wanted))
            continue;
        print("row ");
        print(row->name);
        print("\n");
        pace();
        const char *why_not = row->prepare ? row->prepare() : 0;
        if (why_not) {
            print("skip ");
            print(why_not);
            print("\n");
            continue;
        }
        measure(row);
        if (row->restore)
            row->restore();
    }
    print("done\n");
    say_goodbye();
}
