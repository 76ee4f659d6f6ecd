"""Builds `sockhop.bench._loops`: the client and server loops, which must cost next to nothing."""

from cffi import FFI

CDEF = """
/* Each returns the nanoseconds that `count` connections took, or -errno of the first that failed.
 * They go to the `places` addresses and ports (both as sockaddr_in has them) in turn.
 * connect_and_close() makes one after the other. ask_and_close() sends 64 bytes on each of up to
 * AT_ONCE, then takes the 64 bytes that each is answered: so neither side waits for the other to
 * wake up.
 */
int64_t connect_and_close(int type, const uint32_t *addresses, const uint16_t *ports, int places,
                          int count);
int64_t ask_and_close(int type, const uint32_t *addresses, const uint16_t *ports, int places,
                      int count);

/* Serve one listening TCP socket or one bound UDP socket, one client at a time. They return
 * only on an error of that socket: -errno.
 */
int serve_tcp(int listener);
int serve_udp(int fd);

/* Talks over one connected socket, again and again: exchange() sends `size` bytes and takes as many
 * back, `count` times; stream() sends `size` bytes `count` times. Both return 0 or -errno, and what
 * it took. serve_talk() is the other end, for one connection after the other.
 */
struct taken {
    int64_t wall, client_cpu, server_cpu; /* ns */
};
int exchange(int fd, uint32_t size, uint32_t count, struct taken *taken);
int stream(int fd, uint32_t size, uint32_t count, struct taken *taken);
int serve_talk(int listener);

int unshare(int flags);
#define AT_ONCE ...
#define CLONE_NEWNET ...
"""

SOURCE = r"""
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE 64
#define AT_ONCE 64

static int64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static bool receive_message(int fd)
{
    char message[MESSAGE];

    return recv(fd, message, sizeof(message), MSG_WAITALL) == sizeof(message);
}

static bool send_message(int fd)
{
    static const char message[MESSAGE];

    return send(fd, message, sizeof(message), MSG_NOSIGNAL) == sizeof(message);
}

/* errno stays what it is where an answer is cut short: the callers set it to EPIPE before. */
static int dial(int type, uint32_t address, uint16_t port)
{
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = address, .sin_port = port };
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);

    if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static void hang_up(int type, int fd)
{
    /* With a reset: TIME_WAIT would use up the ports. */
    const struct linger reset = { .l_onoff = 1 };

    if (type == SOCK_STREAM)
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    close(fd);
}

static int64_t connect_and_close(int type, const uint32_t *addresses, const uint16_t *ports,
                                 int places, int count)
{
    int64_t begin = now();

    for (int i = 0; i < count; i++) {
        int fd = dial(type, addresses[i % places], ports[i % places]);

        if (fd < 0)
            return -errno;
        hang_up(type, fd);
    }
    return now() - begin;
}

static int64_t ask_and_close(int type, const uint32_t *addresses, const uint16_t *ports,
                             int places, int count)
{
    int64_t begin = now();
    int fds[AT_ONCE], error = 0;

    for (int done = 0; done < count && !error; done += AT_ONCE) {
        int n = 0;

        errno = EPIPE;
        while (n < AT_ONCE && done + n < count && !error) {
            int place = (done + n) % places;

            fds[n] = dial(type, addresses[place], ports[place]);
            if (fds[n] < 0 || !send_message(fds[n]))
                error = errno;
            if (fds[n] >= 0)
                n++;
        }
        for (int i = 0; i < n; i++) {
            if (!error && !receive_message(fds[i]))
                error = errno;
            hang_up(type, fds[i]);
        }
    }
    return error ? -error : now() - begin;
}

static int serve_tcp(int listener)
{
    for (;;) {
        int fd = accept4(listener, 0, 0, SOCK_CLOEXEC);

        if (fd < 0 && errno != EINTR && errno != ECONNABORTED)
            return -errno;
        if (fd < 0)
            continue;
        if (receive_message(fd))
            send_message(fd);
        close(fd);
    }
}

static int serve_udp(int fd)
{
    for (;;) {
        char message[MESSAGE];
        struct sockaddr_in6 client;
        socklen_t size = sizeof(client);
        ssize_t n = recvfrom(fd, message, sizeof(message), 0, (struct sockaddr *)&client, &size);

        if (n < 0 && errno != EINTR && errno != ECONNREFUSED)
            return -errno;
        if (n >= 0)
            sendto(fd, message, n, 0, (struct sockaddr *)&client, size);
    }
}
"""

SOURCE += r"""
#include <stdlib.h>

struct taken {
    int64_t wall, client_cpu, server_cpu;
};

/* What comes next, so that the server needs to be told nothing else. */
struct order {
    uint32_t is_stream, size, count;
};

#define LONGEST (1 << 20)
static char room[2][LONGEST];

static int64_t spent(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Not MSG_WAITALL: on a spliced socket it returns early. */
static bool receive_all(int fd, void *into, size_t size)
{
    for (size_t got = 0; got < size;) {
        ssize_t n = recv(fd, (char *)into + got, size - got, 0);

        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n <= 0)
            return false;
        got += n;
    }
    return true;
}

static bool send_all(int fd, const void *from, size_t size)
{
    for (size_t sent = 0; sent < size;) {
        ssize_t n = send(fd, (const char *)from + sent, size - sent, MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        sent += n;
    }
    return true;
}

static int talk(int fd, struct order order, struct taken *taken)
{
    int64_t begin, cpu;

    errno = EPIPE;
    if (order.size > LONGEST || !send_all(fd, &order, sizeof(order)) ||
        !receive_all(fd, room[0], 1))
        return -errno;
    begin = now();
    cpu = spent();
    for (uint32_t i = 0; i < order.count; i++)
        if (!send_all(fd, room[0], order.size) ||
            (!order.is_stream && !receive_all(fd, room[0], order.size)))
            return -errno;
    taken->client_cpu = spent() - cpu;
    /* Asked for: two messages in a row would be more than one there and back. */
    if (!order.is_stream && !send_all(fd, "", 1))
        return -errno;
    if (!receive_all(fd, &taken->server_cpu, sizeof(taken->server_cpu)))
        return -errno;
    taken->wall = now() - begin;
    return 0;
}

static int exchange(int fd, uint32_t size, uint32_t count, struct taken *taken)
{
    return talk(fd, (struct order){ 0, size, count }, taken);
}

static int stream(int fd, uint32_t size, uint32_t count, struct taken *taken)
{
    return talk(fd, (struct order){ 1, size, count }, taken);
}

static bool obey(int fd)
{
    struct order order;
    int64_t cpu;

    if (!receive_all(fd, &order, sizeof(order)) || !send_all(fd, "", 1))
        return false;
    cpu = spent();
    if (order.is_stream) {
        for (uint64_t left = (uint64_t)order.size * order.count; left;) {
            ssize_t n = recv(fd, room[1], left < LONGEST ? left : LONGEST, 0);

            if (n <= 0 && !(n < 0 && (errno == EINTR || errno == EAGAIN)))
                return false;
            left -= n > 0 ? n : 0;
        }
    } else {
        for (uint32_t i = 0; i < order.count; i++)
            if (!receive_all(fd, room[1], order.size) || !send_all(fd, room[1], order.size))
                return false;
    }
    cpu = spent() - cpu;
    if (!order.is_stream && !receive_all(fd, room[1], 1))
        return false;
    return send_all(fd, &cpu, sizeof(cpu));
}

static int serve_talk(int listener)
{
    for (;;) {
        int fd = accept4(listener, 0, 0, SOCK_CLOEXEC);

        if (fd < 0 && errno != EINTR && errno != ECONNABORTED)
            return -errno;
        if (fd < 0)
            continue;
        while (obey(fd))
            ;
        close(fd);
    }
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("sockhop.bench._loops", SOURCE)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
