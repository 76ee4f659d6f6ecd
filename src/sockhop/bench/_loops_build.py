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

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("sockhop.bench._loops", SOURCE)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
